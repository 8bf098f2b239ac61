//! MQTT filters with captures: `tele/{device}/SENSOR`, `{site}/raw/{path...}`.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// An MQTT topic filter whose wildcards may have names.
///
/// `{name}` captures one level, `+` takes one level without a name, `{name...}` captures the rest of the
/// topic (also none of it, as MQTT's `#` does), `#` takes the rest without a name; both only at the end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    text: String,
    levels: Vec<Level>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Level {
    Literal(String),
    One(Option<String>),
    Rest(Option<String>),
}

impl Filter {
    /// Returns the filter that an MQTT client subscribes with: captures become `+` and `#`.
    pub fn subscription(&self) -> String {
        let levels: Vec<&str> = self
            .levels
            .iter()
            .map(|level| match level {
                Level::Literal(text) => text.as_str(),
                Level::One(_) => "+",
                Level::Rest(_) => "#",
            })
            .collect();
        levels.join("/")
    }

    /// Returns the names of the captures in order.
    pub fn captures(&self) -> impl Iterator<Item = &str> {
        self.levels.iter().filter_map(|level| match level {
            Level::One(Some(name)) | Level::Rest(Some(name)) => Some(name.as_str()),
            _ => None,
        })
    }

    /// Returns the last level where it is literal: the stream of a native feed.
    pub fn last_literal(&self) -> Option<&str> {
        match self.levels.last() {
            Some(Level::Literal(text)) => Some(text),
            _ => None,
        }
    }

    /// Says whether `topic` matches and appends (name, level) of each capture to `captured`, which is left
    /// as it was where it does not match. Wildcards do not match a first level that begins with `$`
    /// (MQTT-4.7.2-1).
    pub fn capture<'f, 't>(&'f self, topic: &'t str, captured: &mut Vec<(&'f str, &'t str)>) -> bool {
        let before = captured.len();
        let matches = self.walk(topic, captured);
        if !matches {
            captured.truncate(before);
        }
        matches
    }

    fn walk<'f, 't>(&'f self, topic: &'t str, captured: &mut Vec<(&'f str, &'t str)>) -> bool {
        let mut rest = Some(topic);
        for (depth, level) in self.levels.iter().enumerate() {
            let hidden = depth == 0 && topic.starts_with('$');
            match level {
                Level::Rest(_) if hidden => return false,
                Level::Rest(name) => {
                    captured.extend(name.as_deref().map(|name| (name, rest.unwrap_or_default())));
                    return true;
                }
                Level::Literal(_) | Level::One(_) => {}
            }
            let Some(text) = rest else { return false };
            let (head, tail) = match text.split_once('/') {
                Some((head, tail)) => (head, Some(tail)),
                None => (text, None),
            };
            match level {
                Level::Literal(expected) if expected != head => return false,
                Level::One(_) if hidden => return false,
                Level::One(Some(name)) => captured.push((name, head)),
                Level::Literal(_) | Level::One(None) | Level::Rest(_) => {}
            }
            rest = tail;
        }
        rest.is_none()
    }

    /// Orders filters so that the more specific comes first: at the first level that differs in kind a
    /// literal comes before a wildcard and that before the rest. Filters that are equal here are left to
    /// the caller.
    pub fn by_specificity(&self, other: &Self) -> Ordering {
        let rank = |level: Option<&Level>| match level {
            Some(Level::Literal(_)) => 0,
            Some(Level::One(_)) => 1,
            Some(Level::Rest(_)) => 2,
            None => 0,
        };
        let depth = self.levels.len().max(other.levels.len());
        (0..depth)
            .map(|i| rank(self.levels.get(i)).cmp(&rank(other.levels.get(i))))
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A text that is not a filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{filter}` is not a filter: {why}")]
pub struct InvalidFilter {
    filter: String,
    why: String,
}

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(text: &str) -> Result<Self, InvalidFilter> {
        let refuse = |why: String| InvalidFilter { filter: text.to_owned(), why };
        if text.is_empty() {
            return Err(refuse("it is empty".to_owned()));
        }
        if text.len() > usize::from(u16::MAX) || text.contains('\0') {
            return Err(refuse("MQTT allows 65,535 bytes and no NUL".to_owned()));
        }
        if text.starts_with("$share/") {
            return Err(refuse("the bridge adds `$share/…` itself where it reads from a broker".to_owned()));
        }
        let mut levels = Vec::new();
        let mut names: Vec<&str> = Vec::new();
        let count = text.split('/').count();
        for (i, level) in text.split('/').enumerate() {
            let parsed = parse_level(level).map_err(refuse)?;
            if matches!(parsed, Level::Rest(_)) && i + 1 != count {
                return Err(refuse(format!("`{level}` takes the rest, so it must be the last level")));
            }
            if let Level::One(Some(_)) | Level::Rest(Some(_)) = parsed {
                let name = level.trim_matches(['{', '}']).trim_end_matches("...");
                if names.contains(&name) {
                    return Err(refuse(format!("`{{{name}}}` is captured twice")));
                }
                names.push(name);
            }
            levels.push(parsed);
        }
        Ok(Self { text: text.to_owned(), levels })
    }
}

fn parse_level(level: &str) -> Result<Level, String> {
    if level == "+" {
        return Ok(Level::One(None));
    }
    if level == "#" {
        return Ok(Level::Rest(None));
    }
    if let Some(name) = level.strip_prefix('{').and_then(|l| l.strip_suffix('}')) {
        let (name, rest) = match name.strip_suffix("...") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if !is_name {
            return Err(format!(
                "a capture is named with a-z, 0-9 and `_`, starting with a letter, not `{name}`"
            ));
        }
        let name = Some(name.to_owned());
        return Ok(if rest { Level::Rest(name) } else { Level::One(name) });
    }
    match level.chars().find(|c| matches!(c, '+' | '#' | '{' | '}')) {
        Some(c) => Err(format!(
            "`{c}` in `{level}`: a wildcard or capture is a whole level; capture the level and narrow it with `when`"
        )),
        None => Ok(Level::Literal(level.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(filter: &str, topic: &str) -> Option<String> {
        let filter: Filter = filter.parse().expect("a filter");
        let mut out = Vec::new();
        let matches = filter.capture(topic, &mut out);
        assert!(matches || out.is_empty());
        matches.then(|| out.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn filters_match_as_mqtt_says_and_capture_levels() {
        for (filter, topic, expected) in [
            ("tele/{device}/SENSOR", "tele/plug-1/SENSOR", Some("device=plug-1")),
            ("tele/{device}/SENSOR", "tele/plug-1/STATE", None),
            ("tele/{device}/SENSOR", "tele/plug-1/SENSOR/x", None),
            ("tele/{device}", "tele", None),
            ("tele/+/{kind}", "tele/a/b", Some("kind=b")),
            ("{site}/x/{rest...}", "home/x/a/b/c", Some("site=home rest=a/b/c")),
            ("{site}/x/{rest...}", "home/x", Some("site=home rest=")),
            ("{site}/x/{rest...}", "home/y", None),
            ("a/#", "a/b/c", Some("")),
            ("a/{b}", "a/", Some("b=")),
            ("{site}/up", "$SYS/up", None),
            ("#", "$SYS/up", None),
            ("$SYS/{what}", "$SYS/up", Some("what=up")),
        ] {
            assert_eq!(captured(filter, topic).as_deref(), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn subscriptions_are_plain_mqtt() {
        for (filter, subscription) in
            [("tele/{device}/SENSOR", "tele/+/SENSOR"), ("{site}/x/{rest...}", "+/x/#"), ("a/#", "a/#")]
        {
            assert_eq!(filter.parse::<Filter>().expect("a filter").subscription(), subscription);
        }
    }

    #[test]
    fn what_is_no_filter_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "it is empty"),
            ("a/#/b", "must be the last level"),
            ("a/{x...}/b", "must be the last level"),
            ("a/pre-{x}", "is a whole level"),
            ("a/{x}/{x}", "captured twice"),
            ("a/{X}", "a capture is named"),
            ("$share/g/a", "adds `$share/"),
            ("a+/b", "is a whole level"),
        ] {
            let error = text.parse::<Filter>().expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn the_more_specific_filter_comes_first() {
        let filter = |text: &str| text.parse::<Filter>().expect("a filter");
        for (first, second) in [
            ("zigbee2mqtt/bridge", "zigbee2mqtt/{device}"),
            ("a/{b}/c", "a/{b}/{c}"),
            ("a/{b}", "a/{rest...}"),
            ("a/{b}/{c}/d", "{x}/b/c/d"),
        ] {
            assert_eq!(filter(first).by_specificity(&filter(second)), Ordering::Less, "{first} {second}");
            assert_eq!(filter(second).by_specificity(&filter(first)), Ordering::Greater);
        }
    }
}
