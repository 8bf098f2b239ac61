//! Feeds: which topic an MQTT message belongs to, and how its payload is read.

pub mod clock;
pub mod decode;
pub mod expressions;
mod functions;
pub mod native;

use crate::json::JsonFault;
use crate::values::ValueFault;
use expressions::Expressions;
use std::sync::Arc;
use throughline_model::catalog::{
    BRIDGE_GROUP, Catalog, Decoder, FeedSpec, Filter, UNMATCHED, dlt_topic, replay_topic,
};
use throughline_model::time::Timestamp;

/// Streams of the native form in which a message without `values` means nothing.
const STREAMS_OF_VALUES: [&str; 2] = ["telemetry", "reported"];

/// How much of what was wrong with a message is kept.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// One message as it came in.
#[derive(Clone, Copy, Debug)]
pub struct Publish<'a> {
    /// The MQTT topic.
    pub topic: &'a str,
    /// The payload, byte for byte.
    pub payload: &'a [u8],
    /// The MQTT client id of the sender; of the bridge's own session where the broker is another's.
    pub client_id: &'a str,
    /// The user that logged in.
    pub user: Option<&'a str>,
    /// The site that the login is bound to, where it is exactly one.
    pub login_site: Option<&'a str>,
    /// User properties and content type of MQTT 5, as pairs.
    pub properties: &'a [(String, String)],
    /// Platform clock at admission.
    pub received_at: Timestamp,
}

/// Why a message cannot become a record: bad data, which goes to a dead-letter topic.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Reject {
    /// A stable code.
    pub code: &'static str,
    /// What was wrong, with identifiers.
    pub message: String,
}

impl Reject {
    /// Makes a rejection. Of a long message only the beginning is kept: it may quote the payload, and becomes
    /// a header of the dead letter, which must fit where the payload did.
    pub fn new(code: &'static str, mut message: String) -> Self {
        if message.len() > MESSAGE_BYTES_MAX {
            let end = message.floor_char_boundary(MESSAGE_BYTES_MAX);
            message.truncate(end);
            message.push('…');
        }
        Self { code, message }
    }

    /// Makes one from a fault in JSON.
    pub fn json(fault: JsonFault) -> Self {
        Self::value(ValueFault::Json(fault))
    }

    /// Makes one from a value that cannot be a measurement.
    pub fn value(fault: ValueFault) -> Self {
        Self::new(fault.code(), fault.to_string())
    }
}

/// A feed that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("feed `{feed}` of topic `{topic}`: {why}")]
pub struct FeedError {
    /// The topic.
    pub topic: String,
    /// The feed.
    pub feed: String,
    /// Which key is wrong and why.
    pub why: String,
}

/// How the payload of a feed is read.
pub enum Form {
    /// The native form, by hand.
    Native {
        /// Whether `values` must be there.
        values_required: bool,
    },
    /// Any other, by expressions.
    Expressions(Box<Expressions>),
}

/// A compiled feed.
pub struct Feed {
    /// Its name.
    pub name: String,
    /// The topic that it feeds.
    pub topic: Arc<str>,
    /// Where messages go that do not decode.
    pub dead_letters: Arc<str>,
    /// What seq counts within.
    pub stream: String,
    /// How its payload is read.
    pub form: Form,
    filter: Filter,
    first_level: Option<String>,
    last_level: Option<String>,
}

impl Feed {
    fn compile(topic: &str, spec: &FeedSpec) -> Result<Self, FeedError> {
        let refuse = |why: String| FeedError { topic: topic.to_owned(), feed: spec.name.clone(), why };
        let subscription = spec.filter.subscription();
        let literal = |level: Option<&str>| level.filter(|l| !matches!(*l, "+" | "#")).map(str::to_owned);
        let native = spec.decoder == Decoder::Native;
        let stream = if native { spec.filter.last_literal() } else { Some(spec.name.as_str()) };
        let stream =
            stream.ok_or_else(|| refuse("a native filter ends with the stream's name".to_owned()))?;
        let form = if native {
            for needed in ["site", "device"] {
                if !spec.filter.captures().any(|name| name == needed) {
                    return Err(refuse(format!("a native filter captures `{{{needed}}}`")));
                }
            }
            if let Some((key, _)) = spec.expressions().next() {
                return Err(refuse(format!("the native decoder has no expressions, but `{key}` is given")));
            }
            Form::Native { values_required: STREAMS_OF_VALUES.contains(&stream) }
        } else {
            Form::Expressions(Box::new(Expressions::compile(spec).map_err(refuse)?))
        };
        Ok(Self {
            name: spec.name.clone(),
            topic: topic.into(),
            dead_letters: dlt_topic(topic, BRIDGE_GROUP).into(),
            stream: stream.to_owned(),
            form,
            first_level: literal(subscription.split('/').next()),
            last_level: literal(subscription.rsplit('/').next()),
            filter: spec.filter.clone(),
        })
    }

    /// Says whether the feed takes `topic`, appending the captures.
    pub fn matches<'f, 't>(&'f self, topic: &'t str, captured: &mut Vec<(&'f str, &'t str)>) -> bool {
        // Most feeds differ in their first or last level; comparing these first spares the walk.
        let first = self.first_level.as_deref().is_none_or(|level| topic.starts_with(level));
        let last = self.last_level.as_deref().is_none_or(|level| topic.ends_with(level));
        first && last && self.filter.capture(topic, captured)
    }
}

/// All feeds, the most specific first.
pub struct Router {
    feeds: Vec<Feed>,
    unmatched: Arc<str>,
}

impl Router {
    /// Compiles the feeds of a catalog.
    ///
    /// # Errors
    /// [`FeedError`] for the first that cannot be used.
    pub fn compile(catalog: &Catalog) -> Result<Self, FeedError> {
        Self::of_feeds(catalog.feeds().into_iter().map(|(topic, spec)| (topic.spec.name.as_str(), spec)))
    }

    /// Compiles feeds, each with the topic that it feeds. Of equally specific ones the earlier is asked
    /// first.
    ///
    /// # Errors
    /// [`FeedError`] for the first that cannot be used.
    pub fn of_feeds<'s>(feeds: impl IntoIterator<Item = (&'s str, &'s FeedSpec)>) -> Result<Self, FeedError> {
        let compiled: Result<Vec<Feed>, FeedError> =
            feeds.into_iter().map(|(topic, spec)| Feed::compile(topic, spec)).collect();
        let mut feeds = compiled?;
        feeds.sort_by(|a, b| a.filter.by_specificity(&b.filter));
        Ok(Self { feeds, unmatched: dlt_topic(UNMATCHED, BRIDGE_GROUP).into() })
    }

    /// Returns the feeds, the most specific first.
    pub fn feeds(&self) -> &[Feed] {
        &self.feeds
    }

    /// Returns the topic for messages that no feed takes.
    pub const fn unmatched(&self) -> &Arc<str> {
        &self.unmatched
    }

    /// Returns every dead-letter topic of the bridge, sorted.
    pub fn dead_letter_topics(&self) -> Vec<String> {
        let mut topics: Vec<String> = self.feeds.iter().map(|f| f.dead_letters.to_string()).collect();
        topics.push(self.unmatched.to_string());
        topics.sort();
        topics.dedup();
        topics
    }

    /// Returns the topics whose replays the bridge takes, sorted: every topic that has a feed, and the one
    /// that stands for messages without a feed.
    pub fn replayable(&self) -> Vec<String> {
        let mut topics: Vec<String> = self.feeds.iter().map(|f| f.topic.to_string()).collect();
        topics.push(UNMATCHED.to_owned());
        topics.sort();
        topics.dedup();
        topics
    }

    /// Returns every topic that the bridge replays from, sorted.
    pub fn replay_topics(&self) -> Vec<String> {
        self.replayable().iter().map(|topic| replay_topic(topic, BRIDGE_GROUP)).collect()
    }

    /// Returns the MQTT filters that cover every feed, without those that another one covers: a message
    /// that matched two shared subscriptions would be delivered twice.
    pub fn subscriptions(&self) -> Vec<String> {
        let mut all: Vec<String> = self.feeds.iter().map(|f| f.filter.subscription()).collect();
        all.sort();
        all.dedup();
        let covered = |one: &String| all.iter().any(|other| other != one && covers(other, one));
        all.iter().filter(|one| !covered(one)).cloned().collect()
    }
}

/// Says whether every topic that matches `narrow` also matches `wide`.
fn covers(wide: &str, narrow: &str) -> bool {
    let mut wide = wide.split('/');
    let mut narrow = narrow.split('/');
    loop {
        match (wide.next(), narrow.next()) {
            (Some("#"), _) => return true,
            (Some("+"), Some(level)) if level != "#" => {}
            (Some(a), Some(b)) if a == b => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(toml: &str) -> FeedSpec {
        toml::from_str(toml).expect("a feed")
    }

    #[test]
    fn a_feed_that_cannot_be_used_is_refused_with_its_key() {
        for (toml, why) in [
            ("name='n'\nfilter='tl/{site}/x'\ndecoder='native'", "captures `{device}`"),
            ("name='n'\nfilter='tl/{site}/{device}'\ndecoder='native'", "ends with the stream"),
            ("name='n'\nfilter='a/{device}'\ndecoder='json'", "`site` is missing"),
            ("name='n'\nfilter='a/b'\ndecoder='json'\nsite=\"'s'\"", "`device` is missing"),
            ("name='n'\nfilter='a/{device}'\ndecoder='json'\nsite='(('", "`site`"),
            (
                "name='n'\nfilter='a/{device}'\ndecoder='json'\nsite=\"'s'\"\ntime='payload.t'",
                "`time_zone` is missing",
            ),
        ] {
            let feed = spec(toml);
            let error = Router::of_feeds([("device.telemetry.v1", &feed)]).err().expect(toml).to_string();
            assert!(error.contains(why), "{toml}: {error}");
        }
    }

    #[test]
    fn a_long_message_of_a_rejection_is_cut_between_characters() {
        let reject = Reject::new("code", "ä".repeat(100_000) + "b");
        assert!(reject.message.len() <= MESSAGE_BYTES_MAX + 3 && reject.message.ends_with("ä…"));
        assert_eq!(Reject::new("code", "short".to_owned()).message, "short");
    }

    #[test]
    fn subscriptions_leave_out_what_others_cover() {
        let feed = |name: &str, filter: &str| {
            spec(&format!("name='{name}'\nfilter='{filter}'\ndecoder='json'\nsite=\"'s'\"\ndevice=\"'d'\""))
        };
        let feeds =
            [feed("a", "tele/{d}/SENSOR"), feed("b", "tele/#"), feed("c", "x/+/y"), feed("d", "x/z/y")];
        let router = Router::of_feeds(feeds.iter().map(|f| ("t", f))).expect("compiles");
        assert_eq!(router.subscriptions(), ["tele/#", "x/+/y"]);
    }
}
