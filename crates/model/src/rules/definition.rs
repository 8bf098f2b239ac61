//! The file of a rule: TOML, read strictly, and the compiled rule.

use super::check::{self, Types};
use super::expression::{Expression, ExpressionError, Names};
use crate::envelope::Measurement;
use crate::strict_toml::{self, FileError};
use crate::topics;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// The severities, mildest first.
pub const SEVERITIES: [&str; 3] = ["info", "warning", "critical"];
/// How late a message may be and still alert where the rule does not say: longer than any ordinary
/// reconnect, shorter than what a spool holds back overnight.
pub const LATENESS_DEFAULT: Duration = Duration::from_secs(600);
/// After how long a command expires where the rule does not say.
const EXPIRES_IN_DEFAULT: Duration = Duration::from_secs(60);
/// The longest duration that a rule may state.
const DURATION_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The longest id of a rule in bytes: it is a Kafka key and part of ids.
const ID_BYTES_MAX: usize = 64;

/// A rule as its author wrote it. Every key but `id`, `summary`, `severity` and `when` may be left out.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleDefinition {
    /// Lower case letters, digits, `-` and `_`, at most 64 bytes.
    pub id: String,
    /// One sentence for people.
    pub summary: String,
    /// `info`, `warning` or `critical`.
    pub severity: Severity,
    /// The condition, in CEL.
    pub when: String,
    /// What clears the alert; the default is that `when` does not hold.
    #[serde(default)]
    pub clear_when: Option<String>,
    /// How long the condition must hold before it raises; the default is at once.
    #[serde(default, rename = "for")]
    pub hold: Option<Span>,
    /// How far a message's own time may lie behind its arrival; the default is [`LATENESS_DEFAULT`].
    #[serde(default)]
    pub lateness: Option<Span>,
    /// The sites it is about, `*` standing for any characters; the default is all.
    #[serde(default)]
    pub sites: Option<Vec<String>>,
    /// The devices it is about, as `device` or `site/device` with `*`; the default is all.
    #[serde(default)]
    pub devices: Option<Vec<String>>,
    /// Whether it is evaluated; the default is that it is.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Whether it writes alerts; the default is that it does.
    #[serde(default = "yes")]
    pub alert: bool,
    /// Commands to the device when it raises.
    #[serde(default)]
    pub command: Vec<CommandDefinition>,
    /// The topic that messages for which `when` holds are copied to.
    #[serde(default)]
    pub forward: Option<String>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Worth looking at.
    Warning,
    /// A person must act.
    Critical,
}

/// A command as a rule's file states it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandDefinition {
    /// What to do.
    pub name: String,
    /// With what: numbers, texts and booleans by name.
    #[serde(default)]
    pub arguments: BTreeMap<String, Argument>,
    /// After how long it must not be carried out any more; the default is a minute.
    #[serde(default)]
    pub expires_in: Option<Span>,
    /// What is intended; the default is the command's name.
    #[serde(default)]
    pub request_code: Option<String>,
}

/// A value of a command's argument.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Argument {
    /// A boolean.
    Flag(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// A duration in a file: seconds as a number, or text such as `"30s"`, `"5m"`, `"2h"`, `"1d"`, `"250ms"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.as_secs_f64().serialize(to)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Seconds(f64),
            Text(String),
        }
        let span = match Form::deserialize(from).map_err(|_| {
            serde::de::Error::custom("a duration is a number of seconds or a text such as \"30s\" or \"5m\"")
        })? {
            Form::Seconds(seconds) => Duration::try_from_secs_f64(seconds).ok(),
            Form::Text(text) => parse_span(&text),
        };
        span.filter(|d| *d <= DURATION_MAX).map(Span).ok_or_else(|| {
            serde::de::Error::custom(
                "a duration is a number with `ms`, `s`, `m`, `h` or `d`, from 0 to 366 days, such as \"30s\"",
            )
        })
    }
}

/// A rule in force: checked, compiled, its defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Its id.
    pub id: Box<str>,
    /// Its version.
    pub version: i64,
    /// One sentence for people.
    pub summary: Box<str>,
    /// One of [`SEVERITIES`].
    pub severity: &'static str,
    /// Whether it is evaluated.
    pub enabled: bool,
    /// Whether it writes alerts.
    pub alert: bool,
    /// How long the condition must hold.
    pub hold: Duration,
    /// The lateness bound, µs.
    pub lateness_us: i64,
    /// Which devices it is about.
    pub scope: SiteScope,
    /// Commands when it raises.
    pub commands: Vec<CommandAction>,
    /// Where messages go for which the condition holds.
    pub forward: Option<&'static str>,
    pub(super) when: Expression,
    pub(super) clear_when: Option<Expression>,
    /// Names of the measurements that the conditions read, in the order of names.
    values: Vec<Box<str>>,
}

/// A command that a rule sends when it raises.
#[derive(Clone, Debug, PartialEq)]
pub struct CommandAction {
    /// What to do.
    pub name: String,
    /// With what.
    pub arguments: Vec<Measurement>,
    /// After how long it must not be carried out.
    pub expires_in: Duration,
    /// What is intended.
    pub request_code: String,
}

/// Which devices a rule is about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteScope {
    sites: Option<Vec<String>>,
    devices: Option<Vec<String>>,
}

impl SiteScope {
    /// Says whether a device belongs to the scope: a listed site, and a listed device, where there are
    /// lists.
    pub fn covers(&self, site: &str, device: &str) -> bool {
        let any = |patterns: &Option<Vec<String>>, matches: &dyn Fn(&str) -> bool| {
            patterns.as_ref().is_none_or(|all| all.iter().any(|p| matches(p)))
        };
        any(&self.sites, &|p| glob(p, site))
            && any(&self.devices, &|p| match p.split_once('/') {
                Some((s, d)) => glob(s, site) && glob(d, device),
                None => glob(p, device),
            })
    }
}

impl RuleDefinition {
    /// Reads a rule's file.
    ///
    /// # Errors
    /// The first fault with file, line and column; a misspelt key comes with the one that was meant.
    pub fn parse(file: &str, text: &str) -> Result<Self, FileError> {
        let definition: Self = strict_toml::parse(file, text)?;
        let fault = |path: &[&str], what: String| Err(FileError::under(file, text, path, what));
        let id = &definition.id;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
        if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(plain) {
            let what = format!(
                "`{id}` cannot name a rule: lower case letters, digits, `-` and `_`, 1 to {ID_BYTES_MAX} bytes"
            );
            return fault(&["id"], what);
        }
        if definition.summary.trim().is_empty() {
            return fault(
                &["summary"],
                "the summary is empty: one sentence tells people what is wrong".to_owned(),
            );
        }
        for (key, list) in [("sites", &definition.sites), ("devices", &definition.devices)] {
            if list.as_ref().is_some_and(Vec::is_empty) {
                return fault(
                    &[key],
                    format!("`{key}` is empty, so the rule is about nothing: leave it out for all"),
                );
            }
        }
        if let Some(at) = definition.sites.iter().flatten().position(|s| s.contains('/')) {
            return fault(
                &["sites", &at.to_string()],
                "a site has no `/`: a device is named in `devices`".to_owned(),
            );
        }
        for (i, command) in definition.command.iter().enumerate() {
            let at = i.to_string();
            if command.name.is_empty() {
                return fault(&["command", &at, "name"], "the command has no name".to_owned());
            }
            if definition.command[..i].iter().any(|c| c.name == command.name) {
                let what = format!(
                    "the command `{}` is there twice: the ids of commands are derived from their names",
                    command.name
                );
                return fault(&["command", &at, "name"], what);
            }
        }
        if let Some(topic) = &definition.forward {
            let known = forward_topics();
            if !known.contains(&topic.as_str()) {
                let hint = strict_toml::suggestion(topic, known.iter().copied());
                let what = format!(
                    "rules cannot forward to `{topic}`{hint} (topics of data_core that carry device messages: {})",
                    known.join(", ")
                );
                return fault(&["forward"], what);
            }
        }
        if !definition.alert && definition.command.is_empty() && definition.forward.is_none() {
            return fault(&["alert"], "the rule does nothing: no alert, no command, no forward".to_owned());
        }
        Ok(definition)
    }

    /// Checks the conditions in full and compiles them; `names` gives slots.
    ///
    /// # Errors
    /// The first fault, placed in the file where the expression stands in it as it is, with the line of
    /// the expression that it is about.
    pub fn compile(
        &self,
        file: &str,
        text: &str,
        version: i64,
        names: &mut Names,
    ) -> Result<Rule, FileError> {
        let mut types = Types::default();
        let mut compile = |key: &str, expression: &str| {
            check::compile(expression, names, &mut types).map_err(|e| place(file, text, key, expression, &e))
        };
        let when = compile("when", &self.when)?;
        let clear_when = self.clear_when.as_ref().map(|e| compile("clear_when", e)).transpose()?;
        let mut values: Vec<Box<str>> = when.names.clone();
        values.extend(clear_when.iter().flat_map(|e| e.names.iter().cloned()));
        values.sort();
        values.dedup();
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        let known = forward_topics();
        Ok(Rule {
            id: self.id.as_str().into(),
            version,
            summary: self.summary.as_str().into(),
            severity: SEVERITIES[self.severity as usize],
            enabled: self.enabled,
            alert: self.alert,
            hold: self.hold.map_or(Duration::ZERO, |s| s.0),
            lateness_us: micros(self.lateness.map_or(LATENESS_DEFAULT, |s| s.0)),
            scope: SiteScope { sites: self.sites.clone(), devices: self.devices.clone() },
            commands: self.command.iter().map(CommandDefinition::action).collect(),
            forward: self.forward.as_deref().and_then(|t| known.into_iter().find(|k| *k == t)),
            when,
            clear_when,
            values,
        })
    }
}

impl CommandDefinition {
    fn action(&self) -> CommandAction {
        let argument = |(name, value): (&String, &Argument)| {
            let empty = Measurement { name: name.clone(), ..Measurement::default() };
            match value {
                Argument::Flag(flag) => Measurement { flag: Some(*flag), ..empty },
                Argument::Number(number) => Measurement { number: Some(*number), ..empty },
                Argument::Text(text) => Measurement { text: Some(text.clone()), ..empty },
            }
        };
        CommandAction {
            name: self.name.clone(),
            arguments: self.arguments.iter().map(argument).collect(),
            expires_in: self.expires_in.map_or(EXPIRES_IN_DEFAULT, |s| s.0),
            request_code: self.request_code.clone().unwrap_or_else(|| self.name.clone()),
        }
    }
}

impl Rule {
    /// Says whether the conditions read the measurement `name` of a message.
    pub fn reads(&self, name: &str) -> bool {
        self.values.binary_search_by(|v| (**v).cmp(name)).is_ok()
    }

    /// Returns `id@version`, which ids of what the rule brings about are derived from.
    pub fn output_key(&self) -> String {
        format!("{}@{}", self.id, self.version)
    }

    pub(super) fn before(&self) -> impl Iterator<Item = u32> {
        self.expressions().flat_map(|e| e.before.iter().copied())
    }

    fn expressions(&self) -> impl Iterator<Item = &Expression> {
        std::iter::once(&self.when).chain(&self.clear_when)
    }
}

/// Returns the topics that rules may forward to: those of `data_core` that carry device messages, but the
/// one whose readings `bridge_data` alone vouches for.
pub fn forward_topics() -> Vec<&'static str> {
    let carries_messages = |topic: &str| {
        let schema = topics::SCHEMA_FILES.iter().find(|(file, _)| file.strip_suffix(".avsc") == Some(topic));
        schema.is_some_and(|(_, text)| text.contains("\"measurements\""))
    };
    topics::TOPIC_FILES
        .iter()
        .filter_map(|(file, _)| file.strip_suffix(".toml"))
        .filter(|t| t.starts_with("data_core.") && *t != topics::DATA_CORE_READING_V1 && carries_messages(t))
        .collect()
}

fn yes() -> bool {
    true
}

fn parse_span(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(split);
    let seconds = match unit.trim_start() {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    // Whole microseconds, so that "0.1s" and "100ms" are the same.
    let micros = (number * seconds * 1e6).round();
    (micros <= DURATION_MAX.as_micros() as f64).then(|| Duration::from_micros(micros as u64))
}

/// Says whether `text` matches `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(tail)
}

/// Places an expression's error in the file: exactly where the expression stands there on one line as it
/// is, else at its key's value.
fn place(file: &str, text: &str, key: &str, expression: &str, error: &ExpressionError) -> FileError {
    let mut at = FileError::under(file, text, &[key], format!("`{key}`: {error}"));
    let line = text.lines().nth(at.line - 1).unwrap_or_default();
    let value: String = line.chars().skip(at.column - 1).collect();
    let quotes = value.chars().take_while(|c| matches!(c, '"' | '\'')).count();
    let as_it_is = value.chars().skip(quotes).collect::<String>().starts_with(expression);
    if as_it_is && error.line == 1 && !expression.contains('\n') {
        at.column += quotes + error.column - 1;
    }
    at
}
