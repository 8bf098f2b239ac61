//! Checks of topic files that their form alone does not express.

use super::expression;
use super::feed::{Decoder, FeedSpec};
use super::options;
use super::replay;
use super::spec::{Cleanup, Key, PARTITIONS_MAX, TopicSpec};
use crate::strict_toml::{FileError, suggestion};

/// Settings that follow from the file's own keys or from the environment.
const MANAGED_SETTINGS: [(&str, &str); 6] = [
    ("cleanup.policy", "write `cleanup`"),
    ("retention.ms", "write `retention`"),
    ("message.timestamp.type", "it is always LogAppendTime, so that wrong clocks cannot harm retention"),
    ("min.insync.replicas", "the environment sets it"),
    ("unclean.leader.election.enable", "it is always false, so that acknowledged records are never lost"),
    ("compression.type", "producers compress; the broker keeps what they sent"),
];

/// Kafka's topic settings that a file may give (TopicConfig of Kafka 4.3).
const SETTINGS: [&str; 23] = [
    "compression.gzip.level",
    "compression.lz4.level",
    "compression.zstd.level",
    "delete.retention.ms",
    "file.delete.delay.ms",
    "flush.messages",
    "flush.ms",
    "index.interval.bytes",
    "local.retention.bytes",
    "local.retention.ms",
    "max.compaction.lag.ms",
    "max.message.bytes",
    "min.cleanable.dirty.ratio",
    "min.compaction.lag.ms",
    "preallocate",
    "remote.log.copy.disable",
    "remote.log.delete.on.disable",
    "remote.storage.enable",
    "retention.bytes",
    "segment.bytes",
    "segment.index.bytes",
    "segment.jitter.ms",
    "segment.ms",
];

/// A topic file with what is needed to place a fault in it.
pub(super) struct File<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub spec: &'a TopicSpec,
}

impl File<'_> {
    fn fault(&self, path: &[&str], what: impl Into<String>) -> FileError {
        FileError::under(self.name, self.text, path, what)
    }

    /// Places a fault in a feed.
    pub(super) fn feed_fault(&self, index: usize, key: &str, what: impl AsRef<str>) -> FileError {
        let feed = &self.spec.feeds[index].name;
        self.fault(&["feed", &index.to_string(), key], format!("feed `{feed}`: {}", what.as_ref()))
    }
}

/// Returns every fault of a topic file by itself.
pub(super) fn topic(file: &File<'_>) -> Vec<FileError> {
    let spec = file.spec;
    let mut faults = Vec::new();
    let mut fault = |key: &str, what: String| faults.push(file.fault(&[key], what));
    if file.name != format!("{}.toml", spec.name) {
        fault("name", format!("the file of topic `{0}` is called `{0}.toml`", spec.name));
    }
    if !(1..=PARTITIONS_MAX).contains(&spec.partitions) {
        fault("partitions", format!("`partitions` is {}: it is 1 to {PARTITIONS_MAX}", spec.partitions));
    }
    if spec.replication.is_some_and(|r| r < 1) {
        fault("replication", "`replication` is at least 1".to_owned());
    }
    if spec.owner.trim().is_empty() {
        fault("owner", "`owner` is empty: name the team that answers for the topic".to_owned());
    }
    let summary = spec.summary.trim();
    if summary.is_empty() || !summary.ends_with('.') || summary.contains('\n') || summary.contains(". ") {
        fault("summary", "`summary` is one sentence that ends with a full stop".to_owned());
    }
    match (spec.cleanup, spec.retention) {
        (Cleanup::Delete, None) => {
            fault(
                "cleanup",
                "`cleanup = \"delete\"` needs `retention`, for instance `retention = \"7d\"`".to_owned(),
            );
        }
        (Cleanup::Compact, Some(_)) => {
            fault(
                "retention",
                "a compacted topic keeps the last record of each key; remove `retention`".to_owned(),
            );
        }
        _ => {}
    }
    if spec.cleanup == Cleanup::Compact && spec.key == Key::None {
        fault("key", "a compacted topic needs a key".to_owned());
    }
    for key in spec.config.keys() {
        if let Some(what) = setting_fault(key) {
            faults.push(file.fault(&["config", key], what));
        }
    }
    if !spec.feeds.is_empty() && !matches!(spec.name.namespace(), "device" | "3rd_party") {
        let what = format!(
            "only topics of `device` and `3rd_party` have feeds: `{}` holds what services decide",
            spec.name
        );
        faults.push(file.fault(&["feed"], what));
    }
    if !spec.feeds.is_empty() && spec.key != Key::Device {
        faults.push(file.fault(&["key"], "a topic with feeds has the key `site/device`"));
    }
    for index in 0..spec.feeds.len() {
        feed(file, index, &mut faults);
    }
    for (index, key, what) in replay::check(spec) {
        faults.push(file.fault(&["replay", &index.to_string(), key], what));
    }
    faults
}

fn setting_fault(key: &str) -> Option<String> {
    if let Some((_, remedy)) = MANAGED_SETTINGS.iter().find(|(managed, _)| *managed == key) {
        return Some(format!("`{key}` does not belong into `config`: {remedy}"));
    }
    // Settings of a vendor are that vendor's to check.
    let is_vendors = ["confluent.", "redpanda."].iter().any(|prefix| key.starts_with(prefix));
    if is_vendors || SETTINGS.contains(&key) {
        return None;
    }
    Some(format!("`{key}` is not a topic setting of Kafka{}", suggestion(key, SETTINGS)))
}

fn feed(file: &File<'_>, index: usize, faults: &mut Vec<FileError>) {
    let spec = &file.spec.feeds[index];
    let mut fault = |key: &str, what: &str| faults.push(file.feed_fault(index, key, what));
    let is_name = !spec.name.is_empty()
        && spec.name.len() <= 64
        && spec.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !is_name {
        fault("name", "a feed's name has 1 to 64 of a-z, 0-9 and `_`");
    }
    if spec.decoder == Decoder::Native {
        native(spec, &mut fault);
        return;
    }
    let captures_device = spec.filter.captures().any(|name| name == "device");
    if spec.site.is_none() {
        fault(
            "filter",
            "`site` is missing: say where the site comes from, `site = \"capture.site\"`, `site = \"'home'\"` or `site = \"login.site\"`",
        );
    }
    if spec.device.is_none() && !captures_device {
        fault("filter", "`device` is missing, and the filter does not capture `{device}`");
    }
    match (&spec.time, &spec.time_zone) {
        (Some(_), None) => fault(
            "time",
            "`time_zone` is missing: name the zone of times that carry none, for instance \"UTC\" or \"Europe/Berlin\"",
        ),
        (None, Some(_)) => fault("time_zone", "`time_zone` without `time` says nothing"),
        (Some(_), Some(zone)) => {
            if let Err(what) = time_zone(zone) {
                fault("time_zone", &what);
            }
        }
        (None, None) => {}
    }
    if spec.epoch.is_some() && spec.seq.is_none() {
        fault("epoch", "`epoch` without `seq` identifies nothing");
    }
    for (key, what) in options::check(spec) {
        fault(key, &what);
    }
    for (key, text) in spec.expressions() {
        if let Err(what) = expression::check(text, &spec.filter) {
            fault(key, &what);
        }
    }
}

/// A native feed has no expressions: its filter and payload say everything.
fn native(spec: &FeedSpec, fault: &mut impl FnMut(&str, &str)) {
    let captures: Vec<&str> = spec.filter.captures().collect();
    if captures != ["site", "device"] || spec.filter.last_literal().is_none() {
        fault(
            "filter",
            "a native feed's filter captures `{site}` and `{device}`, in this order, and ends in its stream: `tl/{site}/{device}/telemetry`",
        );
    }
    let given = spec.expressions().next().map(|(key, _)| key);
    let options = [
        ("time_zone", spec.time_zone.is_some()),
        ("units", !spec.units.is_empty()),
        ("exclude", !spec.exclude.is_empty()),
        ("columns", !spec.columns.is_empty()),
        ("separator", spec.separator.is_some()),
        ("pattern", spec.pattern.is_some()),
        ("layout", !spec.layout.is_empty()),
    ];
    let given = given.or_else(|| options.iter().find(|(_, given)| *given).map(|(key, _)| *key));
    if let Some(key) = given {
        fault(
            key,
            &format!(
                "`{key}` does not belong to a native feed: the payload says it; use `decoder = \"json\"` for another form"
            ),
        );
    }
}

/// Reads a time zone: an IANA name, `UTC`, or an offset such as `+02:00`.
///
/// # Errors
/// A text that says what a zone may be.
pub fn time_zone(text: &str) -> Result<jiff::tz::TimeZone, String> {
    if text == "UTC" || text == "Z" {
        return Ok(jiff::tz::TimeZone::UTC);
    }
    if let Some(offset) = fixed_offset(text) {
        return Ok(jiff::tz::TimeZone::fixed(offset));
    }
    jiff::tz::TimeZone::get(text)
        .map_err(|_| format!("`{text}` is not a time zone: write an IANA name such as \"Europe/Berlin\", \"UTC\", or an offset such as \"+02:00\""))
}

fn fixed_offset(text: &str) -> Option<jiff::tz::Offset> {
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = digits.split_once(':')?;
    let two = |text: &str, max: i32| {
        let is_two = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
        is_two.then(|| text.parse::<i32>().ok()).flatten().filter(|n| *n <= max)
    };
    let seconds = two(hours, 15)? * 3_600 + two(minutes, 59)? * 60;
    jiff::tz::Offset::from_seconds(sign * seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_names_or_offsets() {
        for text in ["UTC", "Europe/Berlin", "+02:00", "-09:30", "Asia/Kolkata"] {
            assert!(time_zone(text).is_ok(), "{text}");
        }
        for text in ["", "+2", "+99:00", "Berlin", "CEST?", "+é"] {
            assert!(time_zone(text).is_err(), "{text}");
        }
    }
}
