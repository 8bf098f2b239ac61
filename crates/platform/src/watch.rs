//! The role `watch`: lag of every group, dead and foreign ones too, ages of heartbeats, retention headroom.

use crate::context::Context;
use crate::failure::CliError;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};
use throughline_kafka::TopicReader;
use throughline_kafka::admin::Admin;
use throughline_kafka::lag::{GroupLag, LagProbe, LagSnapshot};
use throughline_model::envelope::DeviceMessage;
use throughline_model::time::Timestamp;
use throughline_model::topics::DEVICE_HEARTBEAT_V1;
use throughline_runtime::ports::{Failure, TableReader};
use throughline_runtime::{Clock, WallClock};
use throughline_telemetry::{Metric, RoleHealth, forget, gauge};

/// How often the cluster is asked. Lag in seconds needs no finer step, and a thousand partitions cost a few
/// requests each time.
const INTERVAL: Duration = Duration::from_secs(2);

/// Sites whose heartbeats are followed: as many as a metric has label sets. The site heard of longest ago is
/// forgotten first, because whoever may publish chooses the names.
const SITES_MAX: usize = 4_096;

/// Publishes the metrics of the cluster until the process shall end.
///
/// # Errors
/// When the configuration is refused; a cluster that is away is waited for.
pub fn run(context: &Context, health: RoleHealth) -> Result<(), CliError> {
    let kafka = context.kafka();
    let mut probe = LagProbe::new(&kafka)?;
    let mut heartbeats = Heartbeats { reader: TopicReader::new(&kafka), newest: HashMap::new() };
    let mut retention = Retention::default();
    let mut published = Published::default();
    while !context.shutdown.is_requested() {
        let started = Instant::now();
        let looked = look(context, &mut probe, &mut heartbeats, &mut retention, &mut published);
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
    published: &mut Published,
) -> Result<(), Failure> {
    let snapshot = probe.snapshot()?;
    let now = WallClock.now();
    let cluster = context.config.kafka.cluster_name.as_str();
    publish_lag(published, cluster, &snapshot, now);
    retention.refresh(context, &snapshot)?;
    retention.publish(published, &snapshot, now);
    heartbeats.follow(context)?;
    heartbeats.publish(published, now);
    published.forget_gone();
    Ok(())
}

type Series = (Metric, Vec<(&'static str, String)>);

/// The series of one round and of the one before: what a round does not set any more is gone, as the group,
/// topic or site is that it was about.
#[derive(Default)]
struct Published {
    before: HashSet<Series>,
    now: HashSet<Series>,
}

impl Published {
    fn set(&mut self, metric: Metric, labels: &[(&'static str, &str)], value: f64) {
        gauge(metric, labels).set(value);
        self.now.insert((metric, labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()));
    }

    /// Ends a complete round. One that failed forgets nothing: it does not know what is gone.
    fn forget_gone(&mut self) {
        for (metric, labels) in self.before.difference(&self.now) {
            let labels: Vec<(&'static str, &str)> = labels.iter().map(|(n, v)| (*n, v.as_str())).collect();
            forget(*metric, &labels);
        }
        self.before = std::mem::take(&mut self.now);
    }
}

fn publish_lag(published: &mut Published, cluster: &str, snapshot: &LagSnapshot, now: Timestamp) {
    for ends in &snapshot.partitions {
        let number = ends.partition.partition.to_string();
        let labels = [("cluster_name", cluster), ("topic", &ends.partition.topic), ("partition", &number)];
        published.set(Metric::PartitionEarliestOffset, &labels, ends.earliest as f64);
        published.set(Metric::PartitionLatestOffset, &labels, ends.latest as f64);
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
        published.set(Metric::ConsumerGroupLag, &labels, lag.lag as f64);
        published.set(Metric::ConsumerGroupOffset, &labels, lag.next as f64);
        let seconds = lag.seconds(now).unwrap_or(f64::NAN);
        published.set(Metric::ConsumerGroupLagSeconds, &labels, seconds);
        groups.entry(&lag.group).or_default().add(topic, lag, seconds);
    }
    for (group, sums) in groups {
        let labels = [("cluster_name", cluster), ("group", group)];
        published.set(Metric::ConsumerGroupMaxLag, &labels, sums.max as f64);
        published.set(Metric::ConsumerGroupMaxLagSeconds, &labels, sums.max_seconds);
        published.set(Metric::ConsumerGroupSumLag, &labels, sums.sum as f64);
        for (topic, sum) in sums.topics {
            let labels = [("cluster_name", cluster), ("group", group), ("topic", topic)];
            published.set(Metric::ConsumerGroupTopicSumLag, &labels, sum as f64);
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
        let described = Admin::new(&context.kafka())?.describe(&topics)?;
        self.ms.clear();
        for state in described {
            let deletes = state.configs.get("cleanup.policy").is_some_and(|c| c.value.contains("delete"));
            let ms = state.configs.get("retention.ms").and_then(|c| c.value.parse::<i64>().ok());
            if let Some(ms) = ms.filter(|ms| deletes && *ms > 0) {
                self.ms.insert(state.name, ms);
            }
        }
        self.asked = Some(Instant::now());
        Ok(())
    }

    /// A group without lag has the whole retention ahead of it.
    fn publish(&self, published: &mut Published, snapshot: &LagSnapshot, now: Timestamp) {
        for lag in &snapshot.groups {
            let Some(ms) = self.ms.get(&*lag.partition.topic) else { continue };
            let waited = lag.seconds(now).unwrap_or(0.0);
            let number = lag.partition.partition.to_string();
            let labels =
                [("group", lag.group.as_str()), ("topic", &lag.partition.topic), ("partition", &number)];
            published.set(Metric::RetentionHeadroomSeconds, &labels, *ms as f64 / 1e3 - waited);
        }
    }
}

/// The newest heartbeat of each site.
struct Heartbeats {
    reader: TopicReader,
    newest: HashMap<String, Timestamp>,
}

impl Heartbeats {
    fn follow(&mut self, context: &Context) -> Result<(), Failure> {
        let newest = &mut self.newest;
        self.reader.follow(DEVICE_HEARTBEAT_V1, &mut |batch| {
            for record in batch.iter() {
                // What does not decode is dead-lettered by the stage that owns it; an age needs the rest.
                let Ok(heartbeat) = context.codec.decode::<DeviceMessage>(record.value) else { continue };
                hear(newest, heartbeat.site_id, record.time);
            }
        })
    }

    fn publish(&self, published: &mut Published, now: Timestamp) {
        for (site, at) in &self.newest {
            let labels = [("kind", "device"), ("site", site.as_str())];
            published.set(Metric::HeartbeatAgeSeconds, &labels, (now.0 - at.0).max(0) as f64 / 1e6);
        }
    }
}

fn hear(newest: &mut HashMap<String, Timestamp>, site: String, at: Timestamp) {
    if newest.len() >= SITES_MAX
        && !newest.contains_key(&site)
        && let Some(oldest) = newest.iter().min_by_key(|(_, at)| **at).map(|(site, _)| site.clone())
    {
        newest.remove(&oldest);
    }
    let known = newest.entry(site).or_default();
    *known = (*known).max(at);
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::record::TopicPartition;

    fn lag(group: &str) -> GroupLag {
        GroupLag {
            group: group.to_owned(),
            state: String::new(),
            partition: TopicPartition::new("device.thing.v1", 0),
            next: 1,
            lag: 2,
            caught_up: false,
            first_unprocessed: None,
        }
    }

    #[test]
    fn a_group_that_is_gone_is_not_shown_any_more() {
        let mut published = Published::default();
        let mut round = |groups: &[&str]| {
            let groups = groups.iter().map(|group| lag(group)).collect();
            let snapshot = LagSnapshot { groups, ..LagSnapshot::default() };
            publish_lag(&mut published, "watch-test", &snapshot, Timestamp(0));
            published.forget_gone();
            throughline_telemetry::render()
        };
        assert!(round(&["watch_kept", "watch_deleted"]).contains("watch_deleted"));
        let shown = round(&["watch_kept"]);
        assert!(shown.contains("watch_kept") && !shown.contains("watch_deleted"), "{shown}");
    }

    #[test]
    fn sites_are_bounded_and_the_one_heard_of_longest_ago_goes_first() {
        let mut newest = HashMap::new();
        for number in 0..=SITES_MAX as i64 {
            hear(&mut newest, format!("site-{number}"), Timestamp(number));
        }
        assert_eq!(newest.len(), SITES_MAX);
        assert!(!newest.contains_key("site-0") && newest.contains_key("site-1"));
    }

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
        let snapshot = LagSnapshot { groups, ..LagSnapshot::default() };
        retention.publish(&mut Published::default(), &snapshot, now);
        let headroom = |group| {
            let labels = [("group", group), ("topic", topic), ("partition", "0")];
            gauge(Metric::RetentionHeadroomSeconds, &labels).value()
        };
        assert_eq!(headroom("behind"), 0.0);
        assert_eq!(headroom("overtaken"), -100.0);
        assert_eq!(headroom("at_the_end"), 3_600.0);
    }
}
