//! How the layers of the configuration become one, and what is checked of it.

use super::{Config, Notify};
use crate::failure::CliError;
use std::collections::BTreeMap;
use std::ffi::OsString;
use throughline_local::endpoints::Endpoints;
use throughline_model::strict_toml::{self, FileError};

/// What every environment variable of ours starts with.
const ENVIRONMENT_PREFIX: &str = "THROUGHLINE_";
/// Variables of ours that are no settings: flags, and the directory of downloads.
const OF_THE_COMMAND_LINE: [&str; 3] = ["DATA_DIR", "CONFIG", "CACHE"];

/// Returns the variables that are settings of ours.
///
/// # Errors
/// A usage error that names the variable whose value is not UTF-8. What others put into the environment may be.
pub(super) fn ours(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Vec<(String, String)>, CliError> {
    let names = environment.into_iter().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let ours = names.filter(|(name, _)| {
        name.strip_prefix(ENVIRONMENT_PREFIX).is_some_and(|path| !OF_THE_COMMAND_LINE.contains(&path))
    });
    ours.map(|(name, value)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(wrong(&name, "holds bytes that are not UTF-8")),
    })
    .collect()
}

/// Lays `environment`, the variables of ours, over the file over what runs here over the defaults.
///
/// # Errors
/// A usage error that names the file and line, or the variable, and repeats no value.
pub(super) fn layer(
    running: Option<&Endpoints>,
    file: Option<(&str, &str)>,
    environment: &[(String, String)],
) -> Result<Config, CliError> {
    let mut base = Config::default();
    if let Some(running) = running {
        base.kafka.bootstrap.clone_from(&running.kafka);
        base.registry.url.clone_from(&running.registry);
        base.database.url.clone_from(&running.database);
        base.mqtt.listen.clone_from(&running.mqtt);
        base.http.listen = running.http.trim_start_matches("http://").to_owned();
    }
    let shape = toml::Table::try_from(&base).expect("the defaults are TOML");
    let mut merged = shape.clone();
    if let Some((name, text)) = file {
        // Parsed once for its errors with their lines, once as a table for the keys that it sets.
        strict_toml::parse_secret::<Config>(name, text).map_err(|e| CliError::usage(e.to_string()))?;
        let table: toml::Table = text.parse().expect("it parsed just before");
        overlay(&mut merged, table);
    }
    let mut config = parsed(&merged).map_err(|e| CliError::usage(e.to_string()))?;
    for (name, value) in environment {
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        set_from_environment(&mut merged, &shape, name, path, value)?;
        // One by one, so that the fault is this variable's.
        config = parsed(&merged).map_err(|e| wrong(name, &format!("is wrong: {}", e.what)))?;
    }
    Ok(config)
}

/// Says what is wrong with a variable, in one line: its name may hold anything but `=` and NUL.
fn wrong(variable: &str, how: &str) -> CliError {
    CliError::usage(format!("the environment variable `{}` {how}", variable.escape_debug()))
}

fn parsed(merged: &toml::Table) -> Result<Config, FileError> {
    let text = toml::to_string(merged).expect("a table is TOML");
    strict_toml::parse_secret("settings", &text)
}

fn overlay(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => overlay(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Keys without a default, which the shape does not show; all of them are texts or numbers.
const OPTIONAL_KEYS: [&str; 8] = [
    "database.url_file",
    "mqtt.external_user",
    "mqtt.external_password_file",
    "mqtt.logins_file",
    "telemetry.otlp_endpoint",
    "topics.dir",
    "stages.commit_interval_ms",
    "notify.webhook_url_file",
];

fn set_from_environment(
    merged: &mut toml::Table,
    shape: &toml::Table,
    variable: &str,
    path: &str,
    value: &str,
) -> Result<(), CliError> {
    let key = path.to_lowercase().replace("__", ".");
    let known = shape_keys(shape);
    let (section, name) = key.split_once('.').unwrap_or(("", &key));
    let is_property = section == "kafka" && name.starts_with("properties.");
    if !is_property && !known.contains_key(&key) {
        let nearest = known.keys().min_by_key(|k| strsim::levenshtein(k, &key)).expect("there are keys");
        let nearest = format!("{ENVIRONMENT_PREFIX}{}", nearest.replace('.', "__").to_uppercase());
        return Err(wrong(variable, &format!("names no setting; did you mean `{nearest}`?")));
    }
    let is_not = |kind: &str| wrong(variable, &format!("is not {kind}"));
    let value = match known.get(&key).copied().unwrap_or(Shape::Text) {
        Shape::Integer => toml::Value::Integer(value.parse().map_err(|_| is_not("a whole number"))?),
        Shape::Float => toml::Value::Float(value.parse().map_err(|_| is_not("a number"))?),
        Shape::Boolean => toml::Value::Boolean(value.parse().map_err(|_| is_not("true or false"))?),
        Shape::Text => toml::Value::String(value.to_owned()),
    };
    if is_property {
        // librdkafka's names have dots, which a variable writes as `_`.
        let property = name["properties.".len()..].replace('_', ".");
        return put(merged, &["kafka", "properties", &property], value);
    }
    put(merged, &key.split('.').collect::<Vec<_>>(), value)
}

fn put(table: &mut toml::Table, path: &[&str], value: toml::Value) -> Result<(), CliError> {
    let (last, sections) = path.split_last().expect("a key has at least one part");
    let mut table = table;
    for section in sections {
        let below = table.entry(*section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = below
            .as_table_mut()
            .ok_or_else(|| CliError::usage(format!("`{section}` is a setting, not a section")))?;
    }
    table.insert((*last).to_owned(), value);
    Ok(())
}

#[derive(Clone, Copy)]
enum Shape {
    Text,
    Integer,
    Float,
    Boolean,
}

fn shape_keys(shape: &toml::Table) -> BTreeMap<String, Shape> {
    let mut keys = BTreeMap::new();
    collect_keys("", shape, &mut keys);
    for key in OPTIONAL_KEYS {
        let shape = if key.ends_with("_ms") { Shape::Integer } else { Shape::Text };
        keys.insert(key.to_owned(), shape);
    }
    keys
}

fn collect_keys(prefix: &str, table: &toml::Table, keys: &mut BTreeMap<String, Shape>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        let shape = match value {
            toml::Value::Table(section) => {
                collect_keys(&format!("{key}."), section, keys);
                continue;
            }
            toml::Value::Integer(_) => Shape::Integer,
            toml::Value::Float(_) => Shape::Float,
            toml::Value::Boolean(_) => Shape::Boolean,
            _ => Shape::Text,
        };
        keys.insert(key, shape);
    }
}

/// Checks what the types do not tell.
///
/// # Errors
/// A usage error that names the key and repeats no text: it may be a secret in the wrong place.
pub(super) fn check(config: &Config) -> Result<(), CliError> {
    let refuse = |what: String| Err(CliError::usage(what));
    if !matches!(config.kafka.group_protocol.as_str(), "consumer" | "classic") {
        return refuse("`kafka.group_protocol` is neither `consumer` (KIP-848) nor `classic`".into());
    }
    let database = &config.database.url;
    if !["postgres://", "postgresql://", "sqlite:"].iter().any(|scheme| database.starts_with(scheme)) {
        return refuse("`database.url` starts with neither `postgres://` nor `sqlite:`".into());
    }
    if !(1..=64).contains(&config.mqtt.workers) {
        return refuse(format!("`mqtt.workers` is {}; it is 1 to 64", config.mqtt.workers));
    }
    let Notify { webhook_url, timeout_ms, .. } = &config.notify;
    if !webhook_url.is_empty() && !webhook_url.starts_with("http://") {
        return refuse(
            "`notify.webhook_url` does not start with `http://`; this build speaks no TLS, so a receiver behind \
             `https://` needs a relay beside `notify`"
                .into(),
        );
    }
    if !(100..=30_000).contains(timeout_ms) {
        return refuse(format!("`notify.timeout_ms` is {timeout_ms}; it is 100 to 30000"));
    }
    // A transaction may be open since the commit before; Kafka ends it after 10 s, and the stage would begin
    // again and again.
    if let Some(ms) = config.stages.commit_interval_ms.filter(|ms| !(10..=5_000).contains(ms)) {
        return refuse(format!("`stages.commit_interval_ms` is {ms}; it is 10 to 5,000"));
    }
    let name_ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if config.instance.is_empty() || !config.instance.chars().all(name_ok) {
        return refuse("`instance` is not made of letters, digits, `-`, `_` and `.`".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Stages;
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_defaults() {
        let file = "[kafka]\nbootstrap = \"from-file:1\"\nlinger_ms = 7\n";
        let environment = env(&[("THROUGHLINE_KAFKA__BOOTSTRAP", "from-env:2"), ("HOME", "/")]);
        let config = layer(None, Some(("t.toml", file)), &environment).expect("valid");
        assert_eq!((config.kafka.bootstrap.as_str(), config.kafka.linger_ms), ("from-env:2", 7));
        assert_eq!(config.kafka.group_protocol, "consumer");
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_right_one() {
        let error = layer(None, Some(("t.toml", "[kafka]\nbootstrp = \"x\"\n")), &[]).expect_err("misspelt");
        let text = error.to_string();
        assert!(text.contains("t.toml:2") && text.contains("bootstrap"), "{text}");
        let error = layer(None, None, &env(&[("THROUGHLINE_KAFKA__BOOTSTRP", "x")])).expect_err("misspelt");
        assert!(error.to_string().contains("THROUGHLINE_KAFKA__BOOTSTRAP"), "{error}");
    }

    #[test]
    fn numbers_and_client_properties_come_from_the_environment() {
        let environment = env(&[
            ("THROUGHLINE_MQTT__WORKERS", "3"),
            ("THROUGHLINE_STAGES__COMMIT_INTERVAL_MS", "20"),
            ("THROUGHLINE_KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SSL"),
        ]);
        let config = layer(None, None, &environment).expect("valid");
        assert_eq!((config.mqtt.workers, config.stages.commit_interval_ms), (3, Some(20)));
        assert_eq!(config.kafka.properties.get("security.protocol").map(String::as_str), Some("SSL"));
        let error = layer(None, None, &env(&[("THROUGHLINE_MQTT__WORKERS", "many")])).expect_err("no number");
        assert!(error.to_string().contains("whole number"), "{error}");
    }

    #[test]
    fn a_webhook_that_cannot_be_used_is_refused_without_repeating_its_address() {
        for (key, value, wrong) in [
            ("WEBHOOK_URL", "https://hooks/s3cret", Some("`http://`")),
            ("WEBHOOK_URL", "http://hooks/s3cret", None),
            ("TIMEOUT_MS", "99", Some("100 to 30000")),
            ("TIMEOUT_MS", "100", None),
        ] {
            let environment = env(&[(&format!("THROUGHLINE_NOTIFY__{key}"), value)]);
            let config = layer(None, None, &environment).expect("it has the right form");
            let found = check(&config).err().map(|e| e.to_string());
            assert_eq!(found.is_some(), wrong.is_some(), "{key}={value}: {found:?}");
            let said = found.unwrap_or_default();
            assert!(said.contains(wrong.unwrap_or_default()) && !said.contains("s3cret"), "{said}");
        }
    }

    #[test]
    fn a_commit_interval_that_a_transaction_does_not_outlast_is_refused() {
        for (ms, is_taken) in [(9, false), (10, true), (5_000, true), (5_001, false)] {
            let stages = Stages { commit_interval_ms: Some(ms), ..Stages::default() };
            let checked = check(&Config { stages, ..Config::default() });
            assert_eq!(checked.is_ok(), is_taken, "{ms}");
        }
    }

    #[test]
    fn a_variable_that_does_not_fit_is_named() {
        for (variable, value, wrong) in [
            ("THROUGHLINE_KAFKA__REPLICATION", "99999", "i16"),
            ("THROUGHLINE_TELEMETRY__LOG_FORMAT", "s3cret", "json"),
            ("THROUGHLINE_MQTT__WORKERS", "s3cret", "whole number"),
        ] {
            let error = layer(None, None, &env(&[(variable, value)])).expect_err("it does not fit");
            let said = error.to_string();
            assert!(said.contains(variable) && said.contains(wrong) && !said.contains("s3cret"), "{said}");
        }
    }

    #[test]
    fn what_others_put_into_the_environment_is_left_alone() {
        let bytes = |text: &[u8]| OsString::from_vec(text.to_vec());
        let theirs = [(bytes(b"\xff"), bytes(b"1")), (bytes(b"LS_COLORS"), bytes(b"\xff"))];
        let paths = [(bytes(b"THROUGHLINE_CONFIG"), bytes(b"/\xff"))];
        assert_eq!(ours(theirs.into_iter().chain(paths)).expect("none is ours"), []);
        let error = ours([(bytes(b"THROUGHLINE_DATABASE__URL"), bytes(b"s3cret\xff"))]).expect_err("no text");
        let said = error.to_string();
        assert!(said.contains("`THROUGHLINE_DATABASE__URL`") && !said.contains("s3cret"), "{said}");
    }

    /// Stands where a text belongs, and where none does.
    const SECRET: &str = "s3cret";

    proptest! {
        #[test]
        fn a_secret_is_never_repeated(
            key in prop_oneof![
                "(kafka|registry|database|mqtt|http|telemetry|topics|stages|notify)",
                "(kafka|registry|database|mqtt|http|telemetry|topics|stages|notify)\\.[a-z]{1,8}",
                prop::sample::select(shape_keys(&toml::Table::try_from(Config::default()).expect("TOML"))
                    .into_keys().collect::<Vec<_>>()),
            ],
            form in prop::sample::select(vec!["'#'", "['#']", "{ a = '#' }", "\"#", "'#' '#'", "'\", expected `#'"]),
        ) {
            let value = form.replace('#', SECRET);
            let file = format!("{key} = {value}\n");
            let variable = format!("{ENVIRONMENT_PREFIX}{}", key.replace('.', "__").to_uppercase());
            let of_file = layer(None, Some(("t.toml", &file)), &[]).and_then(|c| check(&c));
            let of_variable = layer(None, None, &env(&[(&variable, &value)])).and_then(|c| check(&c));
            for error in [of_file, of_variable].into_iter().filter_map(Result::err) {
                prop_assert!(!error.to_string().contains(SECRET), "{key} = {value}: {error}");
            }
        }

        #[test]
        fn configuration_of_any_form_is_read_or_refused(
            file in prop_oneof![
                any::<String>(),
                "(\\[(kafka|mqtt|stages|registry)\\]\n)?[a-z_]{1,12} ?= ?(\"[a-z]{0,4}\"|-?[0-9]{1,20}|\\[+|\\{+|true)\n",
            ],
            key in "THROUGHLINE_(KAFKA|MQTT|STAGES|__)?[A-Z_]{0,24}",
            value in "\\PC{0,24}",
        ) {
            let refused = layer(None, Some(("t.toml", &file)), &env(&[(&key, &value)])).err();
            prop_assert!(refused.is_none_or(|e| e.to_string().len() <= 4 * file.len() + 4_096));
        }
    }
}
