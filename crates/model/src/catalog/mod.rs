//! The topic catalog: what `topics/` declares, checked, and everything that follows from it.

mod check;
pub mod derived;
pub mod desired;
pub mod expression;
pub mod feed;
pub mod filter;
pub mod name;
mod options;
pub mod plan;
pub mod replay;
pub mod schema;
pub mod spec;
pub mod strimzi;

pub use check::time_zone;
pub use derived::{DerivedKind, DerivedTopic, StageFault};
pub use desired::{Desired, DesiredTopic, Environment, RECORD_BYTES_MAX};
pub use feed::{Decoder, FeedSpec};
pub use filter::{Filter, InvalidFilter};
pub use name::{
    BRIDGE_GROUP, TopicName, UNMATCHED, changelog_topic, dlt_topic, parking_topic, parse_dlt, parse_parking,
    parse_replay, replay_topic, retry_topic, value_subject,
};
pub use plan::{Change, Observed, ObservedSchema, ObservedTopic, Plan, Refusal, plan};
pub use replay::{ReplayPolicy, ReplaySpec};
pub use spec::{Cleanup, Key, Retention, TopicSpec};

use crate::strict_toml::{FileError, parse, suggestion};
use std::collections::BTreeMap;

/// The catalog, ordered by topic name.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalog {
    topics: BTreeMap<String, Topic>,
}

/// A topic of the catalog.
#[derive(Clone, Debug, PartialEq)]
pub struct Topic {
    /// What its file says.
    pub spec: TopicSpec,
    /// The text of its Avro schema.
    pub schema: String,
}

impl Catalog {
    /// Reads topic files and schemas, each as (file name, text). Where a file name repeats, the later one
    /// counts, so an operator's files after the embedded ones override them.
    ///
    /// # Errors
    /// Every fault of every file, ordered by place.
    pub fn parse<S: AsRef<str>>(files: &[(S, S)], schemas: &[(S, S)]) -> Result<Self, Vec<FileError>> {
        let files = by_name(files);
        let schemas = by_name(schemas);
        let mut faults = Vec::new();
        let mut specs: Vec<(&str, &str, TopicSpec)> = Vec::new();
        for (file, text) in &files {
            match parse::<TopicSpec>(file, text) {
                Ok(mut spec) => {
                    place_replays(file, text, &mut spec);
                    specs.push((file, text, spec));
                }
                Err(fault) => faults.push(fault),
            }
        }
        let read: Vec<check::File<'_>> =
            specs.iter().map(|(name, text, spec)| check::File { name, text, spec }).collect();
        for file in &read {
            faults.extend(check::topic(file));
            faults.extend(schema_faults(file, &schemas));
        }
        faults.extend(collisions(&read));
        faults.extend(feed_collisions(&read));
        if !faults.is_empty() {
            faults.sort();
            faults.dedup();
            return Err(faults);
        }
        let topic = |spec: TopicSpec| {
            let schema = schemas.get(spec.schema.as_str()).map(|text| (*text).to_owned()).unwrap_or_default();
            (spec.name.to_string(), Topic { spec, schema })
        };
        Ok(Self { topics: specs.into_iter().map(|(_, _, spec)| topic(spec)).collect() })
    }

    /// Returns the catalog of this build.
    pub fn embedded() -> Self {
        Self::with_extra::<String>(&[], &[]).expect("a test reads the embedded files")
    }

    /// Returns the catalog of this build with an operator's files over it; a file of the same name
    /// replaces the embedded one.
    ///
    /// # Errors
    /// See [`Catalog::parse`].
    pub fn with_extra<S: AsRef<str>>(files: &[(S, S)], schemas: &[(S, S)]) -> Result<Self, Vec<FileError>> {
        let union = |embedded: &[(&str, &str)], extra: &[(S, S)]| -> Vec<(String, String)> {
            let embedded = embedded.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned()));
            let extra = extra.iter().map(|(n, t)| (n.as_ref().to_owned(), t.as_ref().to_owned()));
            embedded.chain(extra).collect()
        };
        Self::parse(&union(crate::topics::TOPIC_FILES, files), &union(crate::topics::SCHEMA_FILES, schemas))
    }

    /// Returns the topic called `name`.
    pub fn topic(&self, name: &str) -> Option<&Topic> {
        self.topics.get(name)
    }

    /// Iterates over the topics by name.
    pub fn topics(&self) -> impl Iterator<Item = &Topic> {
        self.topics.values()
    }

    /// Returns every feed with its topic in the order in which they are asked: the more specific filter
    /// first, of equal ones those with `when` first, then by topic and place in the file. The first whose
    /// filter matches and whose `when` holds takes the message.
    pub fn feeds(&self) -> Vec<(&Topic, &FeedSpec)> {
        let mut feeds: Vec<(&Topic, &FeedSpec)> =
            self.topics().flat_map(|topic| topic.spec.feeds.iter().map(move |feed| (topic, feed))).collect();
        // The sort is stable: topics come by name, feeds in the order of their file.
        feeds.sort_by(|(_, a), (_, b)| {
            a.filter.by_specificity(&b.filter).then(a.when.is_none().cmp(&b.when.is_none()))
        });
        feeds
    }
}

/// Notes where each policy names its stage, or where it begins.
fn place_replays(file: &str, text: &str, spec: &mut TopicSpec) {
    for (index, replay) in spec.replays.iter_mut().enumerate() {
        let fault = FileError::under(file, text, &["replay", &index.to_string(), "stage"], "");
        replay.place = (fault.line, fault.column);
    }
}

fn by_name<S: AsRef<str>>(files: &[(S, S)]) -> BTreeMap<&str, &str> {
    files.iter().map(|(name, text)| (name.as_ref(), text.as_ref())).collect()
}

fn schema_faults(file: &check::File<'_>, schemas: &BTreeMap<&str, &str>) -> Vec<FileError> {
    let name = file.spec.schema.as_str();
    let Some(text) = schemas.get(name) else {
        let hint = suggestion(name, schemas.keys().copied());
        let what = format!("the schema file `{name}` does not exist beside it{hint}");
        return vec![FileError::under(file.name, file.text, &["schema"], what)];
    };
    let faults = schema::check(&file.spec.name, text).err().unwrap_or_default();
    faults.into_iter().map(|(offset, what)| FileError::at(name, text, offset, what)).collect()
}

/// Names that Kafka's metrics or Kubernetes would confuse.
fn collisions(files: &[check::File<'_>]) -> Vec<FileError> {
    let mut faults = Vec::new();
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for file in files {
        let topic = file.spec.name.as_str();
        let mut fault = |what: String| faults.push(FileError::under(file.name, file.text, &["name"], what));
        if topic == UNMATCHED {
            fault(format!("`{UNMATCHED}` stands for messages that no feed takes and cannot be declared"));
        }
        // Where `.` and `_` both become `-`, names that metrics confuse collide too; one key finds both.
        if let Some(other) = seen.insert(name::kubernetes_name(topic), topic) {
            if other == topic {
                fault(format!("topic `{topic}` is declared twice"));
            } else {
                fault(format!(
                    "`{topic}` and `{other}` are equal where `.` and `_` are one: Kafka's metrics and Kubernetes cannot tell them apart; rename one"
                ));
            }
        }
    }
    faults
}

/// Feeds are streams, so their names are unique; and one that could never be asked is refused.
fn feed_collisions(files: &[check::File<'_>]) -> Vec<FileError> {
    let mut faults = Vec::new();
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut takes: BTreeMap<(String, Option<&str>), &str> = BTreeMap::new();
    let all =
        || files.iter().flat_map(|f| f.spec.feeds.iter().enumerate().map(move |(i, feed)| (f, i, feed)));
    let native: Vec<&str> = all()
        .filter(|(_, _, f)| f.decoder == Decoder::Native)
        .filter_map(|(_, _, f)| f.filter.last_literal())
        .collect();
    for (file, index, feed) in all() {
        if let Some(other) = names.insert(&feed.name, file.name) {
            let what = format!("the name is taken by a feed of `{other}`; a feed's name is its stream");
            faults.push(file.feed_fault(index, "name", what));
        }
        if feed.decoder != Decoder::Native && native.contains(&feed.name.as_str()) {
            let what = format!("`{}` is the stream of a native feed; choose another name", feed.name);
            faults.push(file.feed_fault(index, "name", what));
        }
        let key = (feed.filter.subscription(), feed.when.as_deref());
        if let Some(other) = takes.insert(key, &feed.name) {
            let what = format!(
                "feed `{other}` takes the same messages (`{}`); tell them apart with `when`",
                feed.filter.subscription()
            );
            faults.push(file.feed_fault(index, "filter", what));
        }
    }
    faults
}
