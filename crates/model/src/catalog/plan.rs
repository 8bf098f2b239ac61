//! The difference between what shall be and what is, as a list of changes. Pure: whoever applies it looks
//! first and acts afterwards.
//!
//! Nothing here deletes, shrinks or grows a topic. A partition count is fixed within a major version,
//! because order, state and trace lookup rest on it.

use super::desired::{Desired, DesiredSchema, DesiredTopic};
use super::name::is_ours;
use super::schema;
use std::collections::BTreeMap;
use std::fmt;

/// What the cluster and the registry have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Topics, in any order; others than ours may be among them.
    pub topics: Vec<ObservedTopic>,
    /// The latest schema of each desired subject that exists.
    pub schemas: Vec<ObservedSchema>,
}

/// A topic as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedTopic {
    /// Its name.
    pub name: String,
    /// Number of partitions.
    pub partitions: i32,
    /// Copies of each partition.
    pub replication: i16,
    /// Settings given to the topic itself (Kafka's source `DYNAMIC_TOPIC_CONFIG`), without the broker's
    /// defaults.
    pub configs: BTreeMap<String, String>,
}

/// A subject's schema as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedSchema {
    /// The subject.
    pub subject: String,
    /// The text of its latest version.
    pub latest: String,
    /// Why the registry's own compatibility check refuses the desired schema, where it was asked.
    pub refused: Option<String>,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Register a schema, under FULL_TRANSITIVE compatibility.
    RegisterSchema {
        /// What to register.
        schema: DesiredSchema,
        /// Whether the subject is new.
        first: bool,
        /// Fields that the latest version lacks.
        added: Vec<String>,
    },
    /// Create a topic.
    CreateTopic(DesiredTopic),
    /// Set settings and leave the others alone (IncrementalAlterConfigs).
    AlterConfig {
        /// The topic.
        topic: String,
        /// What to set.
        settings: Vec<Setting>,
    },
}

/// A setting that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its key.
    pub key: String,
    /// What it is on the topic; `None` where the broker's default holds.
    pub from: Option<String>,
    /// What it shall be.
    pub to: String,
}

/// A difference that is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The topic or subject.
    pub what: String,
    /// Why, and what helps.
    pub why: String,
}

/// What to do, what will not be done, and what else was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes in the order in which they are made: schemas before the topics that need them.
    pub changes: Vec<Change>,
    /// Differences that need a person.
    pub refusals: Vec<Refusal>,
    /// What was seen and is left alone; it does not count as a difference.
    pub notes: Vec<String>,
}

impl Plan {
    /// Says whether nothing differs; notes do not count.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.refusals.is_empty()
    }
}

/// Compares what shall be with what is.
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let schemas: BTreeMap<&str, &ObservedSchema> =
        observed.schemas.iter().map(|s| (s.subject.as_str(), s)).collect();
    for schema in &desired.schemas {
        plan_schema(schema, schemas.get(schema.subject.as_str()).copied(), &mut plan);
    }
    let topics: BTreeMap<&str, &ObservedTopic> =
        observed.topics.iter().map(|t| (t.name.as_str(), t)).collect();
    for topic in &desired.topics {
        match topics.get(topic.name.as_str()) {
            None => plan.changes.push(Change::CreateTopic(topic.clone())),
            Some(found) => plan_topic(topic, found, &mut plan),
        }
    }
    let is_desired = |name: &str| desired.topics.iter().any(|t| t.name == name);
    for name in topics.keys().filter(|name| is_ours(name) && !is_desired(name)) {
        plan.notes
            .push(format!("topic {name} follows our names but is not in the catalog; it is left alone"));
    }
    plan
}

fn plan_schema(desired: &DesiredSchema, observed: Option<&ObservedSchema>, plan: &mut Plan) {
    let Some(observed) = observed else {
        plan.changes.push(Change::RegisterSchema { schema: desired.clone(), first: true, added: Vec::new() });
        return;
    };
    match schema::compare(&observed.latest, &desired.text) {
        Ok(evolution) if !evolution.differs => {}
        Ok(evolution) => match &observed.refused {
            None => {
                let added = evolution.added;
                plan.changes.push(Change::RegisterSchema { schema: desired.clone(), first: false, added });
            }
            Some(why) => plan.refusals.push(Refusal {
                what: format!("schema {}", desired.subject),
                why: format!("the registry refuses it: {why}"),
            }),
        },
        Err(reasons) => plan.refusals.push(Refusal {
            what: format!("schema {}", desired.subject),
            why: format!(
                "readers or writers of the registered version would break: {}; a change that breaks is a new major version of the topic",
                reasons.join("; ")
            ),
        }),
    }
}

fn plan_topic(desired: &DesiredTopic, observed: &ObservedTopic, plan: &mut Plan) {
    let mut refuse = |why: String| {
        plan.refusals.push(Refusal { what: format!("topic {}", desired.name), why });
    };
    if desired.partitions != observed.partitions {
        let growth = match &desired.next_major {
            Some(next) => format!("; growth is a new topic `{next}`"),
            None => "; it follows the partitions of the topic that it was derived from".to_owned(),
        };
        refuse(format!(
            "it has {} partitions, the catalog says {}: the count is fixed within a major version, because order, state and trace lookup rest on it{growth}",
            observed.partitions, desired.partitions
        ));
    }
    if desired.replication != observed.replication {
        refuse(format!(
            "it has {} copies, {} are wanted: moving copies loads the cluster and is done with kafka-reassign-partitions",
            observed.replication, desired.replication
        ));
    }
    let differs = |(key, to): (&String, &String)| {
        let from = observed.configs.get(key).cloned();
        (from.as_ref() != Some(to)).then(|| Setting { key: key.clone(), from, to: to.clone() })
    };
    let settings: Vec<Setting> = desired.configs.iter().filter_map(differs).collect();
    if !settings.is_empty() {
        plan.changes.push(Change::AlterConfig { topic: desired.name.clone(), settings });
    }
    for (key, value) in observed.configs.iter().filter(|(key, _)| !desired.configs.contains_key(*key)) {
        plan.notes.push(format!(
            "topic {} has the setting {key}={value}, which its file does not name; it is left alone",
            desired.name
        ));
    }
}

impl fmt::Display for Plan {
    /// Writes one line a change (`+` new, `~` changed), refusal (`!`) and note (`.`), then a summary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.changes {
            writeln!(f, "{change}")?;
        }
        for refusal in &self.refusals {
            writeln!(f, "! {}: {}", refusal.what, refusal.why)?;
        }
        for note in &self.notes {
            writeln!(f, ". {note}")?;
        }
        if self.is_empty() {
            return writeln!(f, "Nothing differs.");
        }
        let (new, changed) = self.changes.iter().fold((0, 0), |(new, changed), change| match change {
            Change::RegisterSchema { first: true, .. } | Change::CreateTopic(_) => (new + 1, changed),
            Change::RegisterSchema { .. } | Change::AlterConfig { .. } => (new, changed + 1),
        });
        writeln!(f, "{new} new, {changed} changed, {} refused.", self.refusals.len())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RegisterSchema { schema, first: true, .. } => {
                write!(f, "+ schema {}: first version", schema.subject)
            }
            Self::RegisterSchema { schema, added, .. } if added.is_empty() => {
                write!(f, "~ schema {}: new version, documentation only", schema.subject)
            }
            Self::RegisterSchema { schema, added, .. } => {
                write!(f, "~ schema {}: new version, adds {}", schema.subject, added.join(", "))
            }
            Self::CreateTopic(topic) => {
                write!(
                    f,
                    "+ topic {}: {} partitions, {} copies",
                    topic.name, topic.partitions, topic.replication
                )?;
                topic.configs.iter().try_for_each(|(key, value)| write!(f, ", {key}={value}"))
            }
            Self::AlterConfig { topic, settings } => {
                write!(f, "~ topic {topic}:")?;
                for (i, setting) in settings.iter().enumerate() {
                    let separator = if i == 0 { "" } else { "," };
                    let from = setting.from.as_deref().unwrap_or("unset");
                    write!(f, "{separator} {} {from} -> {}", setting.key, setting.to)?;
                }
                Ok(())
            }
        }
    }
}
