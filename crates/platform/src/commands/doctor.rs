//! `throughline doctor`: numbered checks of every dependency, each with the command that fixes it.

use crate::commands::topics;
use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use serde_json::{Value, json};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;
use throughline_kafka::admin::Admin;
use throughline_kafka::lag::LagProbe;
use throughline_store::{SqlStore, StoreOptions};

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub struct Args {}

/// How long a connection attempt may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// What a check saw, or what is wrong.
type Check = fn(&Context) -> Result<String, String>;

struct Finding {
    what: &'static str,
    ok: bool,
    detail: String,
    remedy: &'static str,
}

/// Runs every check, prints the findings, and exits with 3 when one of them is bad.
///
/// # Errors
/// Usage errors only: what a check meets is a finding.
pub fn run(flags: &Flags, _args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    let checks: [(&'static str, &'static str, Check); 7] = [
        ("Kafka answers", "start it, or name it with --kafka; `throughline up` brings its own", kafka),
        ("registry answers", "start it, or name it with --registry", registry),
        (
            "topics and schemas are as the catalog says",
            "`throughline topics plan` shows what differs, `throughline topics apply` does it; where all schemas \
             are missing, restore the registry first (docs/operations.md)",
            catalog,
        ),
        ("database answers", "start it, or name it with --database", database),
        ("bridge listens", "throughline run bridge", bridge),
        ("roles are healthy", "read the status; `throughline explain CODE` for a code", roles),
        ("no group has stopped", "throughline groups list; start the role of the group", groups),
    ];
    let mut findings = Vec::new();
    for (what, remedy, check) in checks {
        let (ok, detail) = match check(&context) {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        findings.push(Finding { what, ok, detail, remedy });
    }
    print(flags, &findings);
    Ok(if findings.iter().all(|f| f.ok) { Exit::Done } else { Exit::Found })
}

fn print(flags: &Flags, findings: &[Finding]) {
    if flags.json {
        let checks: Vec<Value> = findings
            .iter()
            .zip(1..)
            .map(|(f, number)| {
                let remedy = (!f.ok).then_some(f.remedy);
                json!({"number": number, "check": f.what, "ok": f.ok, "detail": f.detail, "remedy": remedy})
            })
            .collect();
        output::json("doctor", json!({ "checks": checks }));
        return;
    }
    for (finding, number) in findings.iter().zip(1..) {
        let mark = if finding.ok { "ok " } else { "BAD" };
        output::line(&format!("{number}. {mark} {}: {}", finding.what, finding.detail));
        if !finding.ok {
            output::line(&format!("       fix: {}", finding.remedy));
        }
    }
}

fn kafka(context: &Context) -> Result<String, String> {
    let admin = Admin::new(&context.kafka()).map_err(|e| e.to_string())?;
    let id = admin.cluster_id().map_err(|e| e.to_string())?;
    let brokers = admin.brokers().map_err(|e| e.to_string())?;
    Ok(format!("{} ({brokers} broker, cluster {id})", context.config.kafka.bootstrap))
}

fn registry(context: &Context) -> Result<String, String> {
    let subjects = context.registry().subjects().map_err(|e| e.to_string())?;
    Ok(format!("{} ({} subjects)", context.config.registry.url, subjects.len()))
}

fn catalog(context: &Context) -> Result<String, String> {
    let plan = topics::compare(context).map_err(|e| e.to_string())?;
    if plan.is_empty() {
        return Ok(format!("{} topics", context.catalog.topics().count()));
    }
    Err(format!("{} changes are due, {} are refused", plan.changes.len(), plan.refusals.len()))
}

fn database(context: &Context) -> Result<String, String> {
    let mut store =
        SqlStore::open(&context.config.database.url, StoreOptions::default()).map_err(|e| e.to_string())?;
    store.version().map_err(|e| e.to_string())
}

fn bridge(context: &Context) -> Result<String, String> {
    let own = &context.config.mqtt.listen;
    let target = if own.is_empty() { &context.config.mqtt.external_url } else { own };
    let address = target.trim_start_matches("mqtt://");
    let resolved = address.to_socket_addrs().map_err(|e| format!("{target}: {e}"))?.next();
    let resolved = resolved.ok_or_else(|| format!("{target} has no address"))?;
    TcpStream::connect_timeout(&resolved, CONNECT_WITHIN).map_err(|e| format!("{target}: {e}"))?;
    Ok(target.clone())
}

fn roles(context: &Context) -> Result<String, String> {
    let base = format!("http://{}", context.config.http.listen);
    for page in ["healthz", "readyz"] {
        let url = format!("{base}/{page}");
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(CONNECT_WITHIN))
            .http_status_as_error(false)
            .build()
            .new_agent();
        let mut answer = agent.get(&url).call().map_err(|e| format!("{url}: {e}"))?;
        if !answer.status().is_success() {
            let text = answer.body_mut().read_to_string().unwrap_or_else(|e| e.to_string());
            return Err(format!("{url}: {}", text.trim().replace('\n', "; ")));
        }
    }
    Ok(format!("{base}/v1/status"))
}

/// A group with lag whose oldest record is old has stopped or cannot keep up.
fn groups(context: &Context) -> Result<String, String> {
    const OLD_SECONDS: f64 = 60.0;
    let mut probe = LagProbe::new(&context.kafka()).map_err(|e| e.to_string())?;
    let snapshot = probe.snapshot().map_err(|e| e.to_string())?;
    let now = throughline_runtime::Clock::now(&throughline_runtime::WallClock);
    let ours = crate::roles::stage_specs();
    let behind: Vec<String> = snapshot
        .groups
        .iter()
        .filter(|lag| ours.iter().any(|spec| spec.group == lag.group))
        .filter_map(|lag| {
            lag.seconds(now)
                .filter(|s| *s > OLD_SECONDS)
                .map(|s| format!("{} on {} by {s:.0} s", lag.group, lag.partition))
        })
        .collect();
    // Kafka drops the offsets of a topic that is deleted: whoever stopped over that shows no lag.
    let has = |group: &str, topic: &str| {
        snapshot.groups.iter().any(|lag| lag.group == group && *lag.partition.topic == *topic)
    };
    let holds_records = |topic: &str| {
        snapshot.partitions.iter().any(|held| *held.partition.topic == *topic && held.latest > held.earliest)
    };
    let configured = crate::roles::ROLES.iter().filter(|role| role.lacks(&context.config).is_none());
    let at_work = configured.filter_map(|role| role.spec).map(|spec| spec());
    let inputs = at_work.flat_map(|spec| spec.inputs.into_iter().map(move |input| (spec.group, input)));
    let without = inputs.filter(|(group, input)| !has(group, input) && holds_records(input));
    let without: Vec<String> = without.map(|(group, input)| format!("{group}/{input}")).collect();
    let without = match without.is_empty() {
        true => String::new(),
        false => format!("; no offsets in: {}", without.join(", ")),
    };
    if behind.is_empty() {
        Ok(format!("{} stages{without}", ours.len()))
    } else {
        Err(format!("behind: {}", behind.join(", ")))
    }
}
