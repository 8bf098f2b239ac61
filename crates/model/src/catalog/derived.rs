//! Topics that follow from stages: dead letters, replays, parking, retries, changelogs; and the bridge's.

use super::name::{
    BRIDGE_GROUP, UNMATCHED, changelog_topic, dlt_topic, parking_topic, replay_topic, retry_topic,
    unknown_topic,
};
use super::spec::{Cleanup, Retention};
use super::{Catalog, Topic};
use crate::stage::{Kind, StageSpec};

/// Dead letters wait for a person, who may be on leave.
const DLT_RETENTION: Retention = Retention::days(90);
/// What exhausted its replays is evidence; it is kept a year.
const PARKING_RETENTION: Retention = Retention::days(365);
/// Replays and retries are consumed like inputs, but a group may be down for long.
const REPLAY_RETENTION: Retention = Retention::days(30);

/// What a derived topic is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DerivedKind {
    /// Records that the group cannot process.
    DeadLetter,
    /// Dead letters on their way back to the group; co-partitioned with the input.
    Replay,
    /// Dead letters whose replays are exhausted.
    Parking,
    /// Records that an act stage tries again later.
    Retry,
    /// The state of a decide stage; co-partitioned with its inputs.
    Changelog,
}

/// A topic that follows from a stage or from the bridge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DerivedTopic {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub kind: DerivedKind,
    /// The topic that it was derived from.
    pub origin: String,
    /// The group that owns it.
    pub group: String,
    /// Number of partitions.
    pub partitions: i32,
    /// What happens to old records.
    pub cleanup: Cleanup,
    /// How long records are kept, where they are deleted.
    pub retention: Option<Retention>,
}

/// A stage whose topics do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage `{stage}`: {what}")]
pub struct StageFault {
    /// The stage.
    pub stage: String,
    /// What does not fit, and what helps.
    pub what: String,
}

impl Catalog {
    /// Returns the topics that follow from `stages` and from the bridge, ordered by name.
    ///
    /// # Errors
    /// Every [`StageFault`]: an input that is not in the catalog, inputs or a changelog whose partition
    /// counts differ.
    pub fn derived(&self, stages: &[StageSpec]) -> Result<Vec<DerivedTopic>, Vec<StageFault>> {
        let mut topics = self.bridge_topics();
        let mut faults = Vec::new();
        for stage in stages {
            match self.of_stage(stage) {
                Ok(derived) => topics.extend(derived),
                Err(what) => faults.push(StageFault { stage: stage.group.to_owned(), what }),
            }
        }
        topics.sort();
        topics.dedup();
        if faults.is_empty() { Ok(topics) } else { Err(faults) }
    }

    fn bridge_topics(&self) -> Vec<DerivedTopic> {
        let fed = self.topics().filter(|t| !t.spec.feeds.is_empty());
        let mut topics: Vec<DerivedTopic> =
            fed.flat_map(|t| letters(t.spec.name.as_str(), BRIDGE_GROUP, t.spec.partitions)).collect();
        // A message that no feed took may become one of any of them, so it is co-partitioned with them: one
        // task of the bridge's replays reads the same partition of all.
        let partitions = self.topics().filter(|t| !t.spec.feeds.is_empty()).map(|t| t.spec.partitions).max();
        topics.extend(letters(UNMATCHED, BRIDGE_GROUP, partitions.unwrap_or(1)));
        topics
    }

    fn of_stage(&self, stage: &StageSpec) -> Result<Vec<DerivedTopic>, String> {
        let find = |name: &str| -> Result<&Topic, String> {
            self.topic(name).ok_or_else(|| unknown_topic(name, self.topics().map(|t| t.spec.name.as_str())))
        };
        for table in &stage.tables {
            if find(table)?.spec.cleanup != Cleanup::Compact {
                return Err(format!("`{table}` is read whole as a table, so it must be compacted"));
            }
        }
        let Some(first) = stage.inputs.first() else {
            return Err("it has no input".to_owned());
        };
        let partitions = find(first)?.spec.partitions;
        let mut topics = Vec::new();
        for input in &stage.inputs {
            let found = find(input)?.spec.partitions;
            if found != partitions {
                return Err(format!(
                    "its inputs are not co-partitioned: `{first}` has {partitions} partitions, `{input}` has {found}"
                ));
            }
            topics.extend(letters(input, stage.group, partitions));
            if stage.kind == Kind::Act {
                let retry = retry_topic(input, stage.group);
                topics.push(deleted(
                    retry,
                    DerivedKind::Retry,
                    input,
                    stage.group,
                    partitions,
                    REPLAY_RETENTION,
                ));
            }
        }
        if let Some(changelog) = &stage.changelog {
            topics.extend(self.changelog(stage, first, partitions, changelog)?);
        }
        Ok(topics)
    }

    fn changelog(
        &self,
        stage: &StageSpec,
        first_input: &str,
        partitions: i32,
        changelog: &str,
    ) -> Result<Option<DerivedTopic>, String> {
        if stage.kind != Kind::Decide {
            return Err("only a decide stage has a changelog".to_owned());
        }
        if let Some(published) = self.topic(changelog) {
            if published.spec.cleanup != Cleanup::Compact {
                return Err(format!("its state is published as `{changelog}`, which must be compacted"));
            }
            if published.spec.partitions != partitions {
                return Err(format!(
                    "its state is not co-partitioned: `{changelog}` has {} partitions, the inputs {partitions}",
                    published.spec.partitions
                ));
            }
            return Ok(None);
        }
        let expected = changelog_topic(first_input, stage.group);
        if changelog != expected {
            return Err(format!("its changelog `{changelog}` is neither a catalog topic nor `{expected}`"));
        }
        Ok(Some(DerivedTopic {
            name: expected,
            kind: DerivedKind::Changelog,
            origin: first_input.to_owned(),
            group: stage.group.to_owned(),
            partitions,
            cleanup: Cleanup::Compact,
            retention: None,
        }))
    }
}

/// Dead letters, replays and parking of one input.
fn letters(topic: &str, group: &str, partitions: i32) -> [DerivedTopic; 3] {
    [
        deleted(dlt_topic(topic, group), DerivedKind::DeadLetter, topic, group, 1, DLT_RETENTION),
        deleted(replay_topic(topic, group), DerivedKind::Replay, topic, group, partitions, REPLAY_RETENTION),
        deleted(parking_topic(topic, group), DerivedKind::Parking, topic, group, 1, PARKING_RETENTION),
    ]
}

fn deleted(
    name: String,
    kind: DerivedKind,
    origin: &str,
    group: &str,
    partitions: i32,
    retention: Retention,
) -> DerivedTopic {
    let (origin, group) = (origin.to_owned(), group.to_owned());
    DerivedTopic {
        name,
        kind,
        origin,
        group,
        partitions,
        cleanup: Cleanup::Delete,
        retention: Some(retention),
    }
}
