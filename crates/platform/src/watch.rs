//! The role `watch`: lag of every group, dead and foreign ones too, ages of heartbeats, retention headroom.

use crate::context::Context;
use crate::failure::CliError;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};
use throughline_kafka::TopicReader;
use throughline_kafka::admin::Admin;
use throughline_kafka::lag::{GroupLag, LagProbe, LagSnapshot};
use throughline_model::envelope::DeviceMessage;
use throughline_model::time::Timestamp;
use throughline_model::topics::DEVICE_HEARTBEAT_V1;
use throughline_runtime::ports::{Failure, TableReader};
use throughline_runtime::{Clock, WallClock};
use throughline_telemetry::{Metric, RoleHealth, gauge};

/// How often the cluster is asked. Lag in seconds needs no finer step, and a thousand partitions cost a few
/// requests each time.
const INTERVAL: Duration = Duration::from_secs(2);

/// Publishes the metrics of the cluster until the process shall end.
///
/// # Errors
/// When the configuration is refused; a cluster that is away is waited for.
pub fn run(context: &Context, health: RoleHealth) -> Result<(), CliError> {
    let kafka = context.kafka();
    let mut probe = LagProbe::new(&kafka)?;
    let mut heartbeats = Heartbeats { reader: TopicReader::new(&kafka), newest: HashMap::new() };
    let mut retention = Retention::default();
    while !context.shutdown.is_requested() {
        let started = Instant::now();
        let looked = look(context, &mut probe, &mut heartbeats, &mut retention);
        health.turned();
        match looked {
            Ok(()) => {
                health.dependency("kafka", true, "");
                health.ready(true, "");
            }
            Err(Failure::Dependency { dependency, message }) => {
                health.dependency(dependency, false, &message);
                // Its job is to report; without the cluster there is nothing that it could report.
                health.ready(false, &message);
            }
            Err(other) => return Err(other.into()),
        }
        while started.elapsed() < INTERVAL && !context.shutdown.is_requested() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

fn look(
    context: &Context,
    probe: &mut LagProbe,
    heartbeats: &mut Heartbeats,
    retention: &mut Retention,
) -> Result<(), Failure> {
    let snapshot = probe.snapshot()?;
    let now = WallClock.now();
    let cluster = context.config.kafka.cluster_name.as_str();
    publish_lag(cluster, &snapshot, now);
    retention.refresh(context, &snapshot)?;
    retention.publish(&snapshot, now);
    heartbeats.publish(context, now)
}

fn publish_lag(cluster: &str, snapshot: &LagSnapshot, now: Timestamp) {
    for ends in &snapshot.partitions {
        let number = ends.partition.partition.to_string();
        let labels = [("cluster_name", cluster), ("topic", &ends.partition.topic), ("partition", &number)];
        gauge(Metric::PartitionEarliestOffset, &labels).set(ends.earliest as f64);
        gauge(Metric::PartitionLatestOffset, &labels).set(ends.latest as f64);
    }
    let mut groups: BTreeMap<&str, GroupSums<'_>> = BTreeMap::new();
    for lag in &snapshot.groups {
        let number = lag.partition.partition.to_string();
        let topic: &str = &lag.partition.topic;
        let labels = [
            ("cluster_name", cluster),
            ("group", lag.group.as_str()),
            ("topic", topic),
            ("partition", &number),
        ];
        gauge(Metric::ConsumerGroupLag, &labels).set(lag.lag as f64);
        gauge(Metric::ConsumerGroupOffset, &labels).set(lag.next as f64);
        let seconds = lag.seconds(now).unwrap_or(f64::NAN);
        gauge(Metric::ConsumerGroupLagSeconds, &labels).set(seconds);
        groups.entry(&lag.group).or_default().add(topic, lag, seconds);
    }
    for (group, sums) in groups {
        let labels = [("cluster_name", cluster), ("group", group)];
        gauge(Metric::ConsumerGroupMaxLag, &labels).set(sums.max as f64);
        gauge(Metric::ConsumerGroupMaxLagSeconds, &labels).set(sums.max_seconds);
        gauge(Metric::ConsumerGroupSumLag, &labels).set(sums.sum as f64);
        for (topic, sum) in sums.topics {
            let labels = [("cluster_name", cluster), ("group", group), ("topic", topic)];
            gauge(Metric::ConsumerGroupTopicSumLag, &labels).set(sum as f64);
        }
    }
}

#[derive(Default)]
struct GroupSums<'a> {
    sum: i64,
    max: i64,
    max_seconds: f64,
    topics: BTreeMap<&'a str, i64>,
}

impl<'a> GroupSums<'a> {
    fn add(&mut self, topic: &'a str, lag: &GroupLag, seconds: f64) {
        self.sum += lag.lag;
        self.max = self.max.max(lag.lag);
        self.max_seconds = self.max_seconds.max(seconds);
        *self.topics.entry(topic).or_default() += lag.lag;
    }
}

/// `retention.ms` of the topics that groups read. It changes rarely, so it is asked for once a minute.
#[derive(Default)]
struct Retention {
    ms: HashMap<String, i64>,
    asked: Option<Instant>,
}

impl Retention {
    const REFRESH: Duration = Duration::from_secs(60);

    fn refresh(&mut self, context: &Context, snapshot: &LagSnapshot) -> Result<(), Failure> {
        if self.asked.is_some_and(|asked| asked.elapsed() < Self::REFRESH) {
            return Ok(());
        }
        let mut topics: Vec<&str> = snapshot.groups.iter().map(|lag| &*lag.partition.topic).collect();
        topics.sort_unstable();
        topics.dedup();
        for state in Admin::new(&context.kafka())?.describe(&topics)? {
            let deletes = state.configs.get("cleanup.policy").is_some_and(|c| c.value.contains("delete"));
            let ms = state.configs.get("retention.ms").and_then(|c| c.value.parse::<i64>().ok());
            match ms.filter(|ms| deletes && *ms > 0) {
                Some(ms) => drop(self.ms.insert(state.name, ms)),
                None => drop(self.ms.remove(&state.name)),
            }
        }
        self.asked = Some(Instant::now());
        Ok(())
    }

    /// A group without lag has the whole retention ahead of it.
    fn publish(&self, snapshot: &LagSnapshot, now: Timestamp) {
        for lag in &snapshot.groups {
            let Some(ms) = self.ms.get(&*lag.partition.topic) else { continue };
            let waited = lag.seconds(now).unwrap_or(0.0);
            let number = lag.partition.partition.to_string();
            let labels =
                [("group", lag.group.as_str()), ("topic", &lag.partition.topic), ("partition", &number)];
            gauge(Metric::RetentionHeadroomSeconds, &labels).set(*ms as f64 / 1e3 - waited);
        }
    }
}

/// The newest heartbeat of each site.
struct Heartbeats {
    reader: TopicReader,
    newest: HashMap<String, Timestamp>,
}

impl Heartbeats {
    fn publish(&mut self, context: &Context, now: Timestamp) -> Result<(), Failure> {
        let newest = &mut self.newest;
        self.reader.follow(DEVICE_HEARTBEAT_V1, &mut |batch| {
            for record in batch.iter() {
                // What does not decode is dead-lettered by the stage that owns it; an age needs the rest.
                let Ok(heartbeat) = context.codec.decode::<DeviceMessage>(record.value) else { continue };
                let at = newest.entry(heartbeat.site_id).or_default();
                *at = (*at).max(record.time);
            }
        })?;
        for (site, at) in newest {
            let labels = [("kind", "device"), ("site", site.as_str())];
            gauge(Metric::HeartbeatAgeSeconds, &labels).set((now.0 - at.0).max(0) as f64 / 1e6);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::record::TopicPartition;

    #[test]
    fn headroom_is_what_retention_leaves_to_the_first_record_that_waits() {
        let topic = "device.headroom.v1";
        let lag = |group: &str, first_unprocessed: Option<Timestamp>| GroupLag {
            group: group.to_owned(),
            state: "Stable".to_owned(),
            partition: TopicPartition::new(topic, 0),
            next: 7,
            lag: 3,
            caught_up: first_unprocessed.is_none(),
            first_unprocessed,
        };
        let groups = vec![
            lag("behind", Some(Timestamp::from_millis(100_000))),
            lag("overtaken", Some(Timestamp(0))),
            lag("at_the_end", None),
        ];
        let retention = Retention { ms: HashMap::from([(topic.to_owned(), 3_600_000)]), asked: None };
        let now = Timestamp::from_millis(3_700_000);
        retention.publish(&LagSnapshot { partitions: Vec::new(), groups }, now);
        let headroom = |group| {
            let labels = [("group", group), ("topic", topic), ("partition", "0")];
            gauge(Metric::RetentionHeadroomSeconds, &labels).value()
        };
        assert_eq!(headroom("behind"), 0.0);
        assert_eq!(headroom("overtaken"), -100.0);
        assert_eq!(headroom("at_the_end"), 3_600.0);
    }
}
