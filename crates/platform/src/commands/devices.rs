//! `throughline devices`: twins and last sessions, from the store.

use crate::config::Flags;
use crate::failure::{CliError, Exit};
use crate::output;
use serde_json::{Value, json};
use throughline_model::ids::DeviceKey;
use throughline_store::{SqlStore, StoreOptions};

/// Arguments of `devices`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List devices with presence and versions
    List {
        /// Only this site
        #[arg(long)]
        site: Option<String>,
        /// How many at most
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Go on after this device, `site/device`
        #[arg(long)]
        after: Option<DeviceKey>,
    },
    /// Show a device's twin and its last session
    Show {
        /// `site/device`
        device: DeviceKey,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 1 for a device that is not known, 4 when the database is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let config = flags.load()?;
    let mut store = SqlStore::open(&config.database.url, StoreOptions::default())?;
    match &args.command {
        Command::List { site, limit, after } => {
            list(flags, &mut store, site.as_deref(), after.as_ref(), *limit)
        }
        Command::Show { device } => show(flags, &mut store, device),
    }
}

fn list(
    flags: &Flags,
    store: &mut SqlStore,
    site: Option<&str>,
    after: Option<&DeviceKey>,
    limit: u32,
) -> Result<Exit, CliError> {
    let cursor = after.map(|key| (key.site(), key.device()));
    let twins = store.twins(site, cursor, limit)?;
    if flags.json {
        let devices: Vec<Value> = twins
            .iter()
            .map(|t| {
                json!({
                    "device": format!("{}/{}", t.site_id, t.device_id), "presence": t.presence,
                    "last_seen_at": t.last_seen_at.to_string(), "reported_version": t.reported_version,
                    "desired_version": t.desired_version,
                })
            })
            .collect();
        output::json("devices.list", json!({ "devices": devices }));
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = twins
        .iter()
        .map(|t| {
            vec![
                format!("{}/{}", t.site_id, t.device_id),
                t.presence.clone(),
                t.last_seen_at.to_string(),
                t.reported_version.to_string(),
                t.desired_version.to_string(),
            ]
        })
        .collect();
    output::table(&["DEVICE", "PRESENCE", "LAST SEEN", "REPORTED", "DESIRED"], &rows);
    if twins.len() == limit as usize
        && let Some(last) = twins.last()
    {
        output::notice(&format!("more: --after {}/{}", last.site_id, last.device_id));
    }
    Ok(Exit::Done)
}

fn show(flags: &Flags, store: &mut SqlStore, device: &DeviceKey) -> Result<Exit, CliError> {
    let twin = store.twin(device.site(), device.device())?.ok_or_else(|| {
        CliError::failed(format!("no twin of `{device}`: it sent nothing yet, or `project_twins` is behind (`throughline groups list`)"))
    })?;
    let document: Value = serde_json::from_str(&twin.document)
        .map_err(|e| CliError::failed(format!("the stored twin of `{device}` is not JSON: {e}")))?;
    let session = store.last_session(device.site(), device.device())?;
    if flags.json {
        let session = session.map(|s| {
            json!({
                "event": s.event, "client_id": s.client_id, "cause": s.cause, "protocol": s.protocol,
                "at": s.received_at.to_string(),
            })
        });
        output::json(
            "devices.show",
            json!({"device": device.as_str(), "twin": document, "last_session": session}),
        );
        return Ok(Exit::Done);
    }
    output::line(&format!("{device}  {}  last seen {}", twin.presence, twin.last_seen_at));
    if let Some(s) = session {
        let cause = s.cause.map(|c| format!(" ({c})")).unwrap_or_default();
        output::line(&format!("last session: {} {}{cause} at {}", s.client_id, s.event, s.received_at));
    }
    for (side, version) in [("reported", twin.reported_version), ("desired", twin.desired_version)] {
        output::line(&format!("\n{side}, version {version}"));
        fields(&document[side]);
    }
    if document["delta"].as_object().is_some_and(|delta| !delta.is_empty()) {
        output::line("\ndelta: desired but not reported");
        fields(&document["delta"]);
    }
    Ok(Exit::Done)
}

fn fields(side: &Value) {
    let text = |field: &Value, name: &str| match &field[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let rows: Vec<Vec<String>> = side
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, field)| {
            vec![format!("  {name}"), text(field, "value"), text(field, "unit"), text(field, "at")]
        })
        .collect();
    output::table(&["  NAME", "VALUE", "UNIT", "AT"], &rows);
}
