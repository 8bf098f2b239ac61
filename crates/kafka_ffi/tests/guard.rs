//! The guard against librdkafka's issue 5280, on librdkafka's own mock cluster.

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka_sys as sys;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

/// What the client logs.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn copied(&self) -> Vec<String> {
        self.0.lock().expect("no test panics with it").clone()
    }
}

impl ClientContext for Lines {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.lock().expect("no test panics with it").push(format!("{facility} {message}"));
    }
}

impl ConsumerContext for Lines {}

fn fetches(lines: &Lines) -> Vec<String> {
    lines.copied().into_iter().filter(|line| line.contains("Sent FetchRequest (v")).collect()
}

fn poll_until(consumer: &BaseConsumer<Lines>, what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "waited {DEADLINE:?} in vain for {what}");
        drop(consumer.poll(Duration::from_millis(20)));
    }
}

#[test]
fn leaders_are_learnt_from_metadata_alone() {
    throughline_kafka_ffi::guard::require();
    let lines = Lines::default();
    let consumer: BaseConsumer<Lines> = ClientConfig::new()
        .set("bootstrap.servers", "unused")
        .set("test.mock.num.brokers", "2")
        .set("group.id", "g")
        .set("fetch.wait.max.ms", "100")
        .set("debug", "protocol,metadata")
        .set_log_level(RDKafkaLogLevel::Debug)
        .create_with_context(lines.clone())
        .expect("a client");
    let mock = consumer.client().mock_cluster().expect("a mock cluster");
    mock.create_topic("t", 4, 1).expect("a topic");
    let mut list = TopicPartitionList::new();
    for partition in 0..4 {
        mock.partition_leader("t", partition, Some(1)).expect("a leader");
        list.add_partition_offset("t", partition, Offset::Beginning).expect("an offset");
    }
    consumer.assign(&list).expect("an assignment");
    let from = |broker: &str| fetches(&lines).iter().any(|line| line.contains(broker));
    poll_until(&consumer, "a fetch from the first leader", || from("/1: "));
    for partition in 0..3 {
        // The next answer says of these that there is no leader, as a broker does between two of them.
        #[expect(unsafe_code, reason = "rdkafka does not expose it")]
        // SAFETY: the mock cluster lives as long as the client that has it.
        let pushed = unsafe {
            let cluster = sys::rd_kafka_handle_mock_cluster(consumer.client().native_ptr());
            sys::rd_kafka_mock_partition_push_leader_response(cluster, c"t".as_ptr(), partition, -1, 2)
        };
        assert_eq!(pushed, sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR);
    }
    for partition in 0..4 {
        mock.partition_leader("t", partition, Some(2)).expect("a leader");
    }
    poll_until(&consumer, "a fetch from the next leader", || from("/2: "));
    let sent = fetches(&lines);
    assert!(sent.iter().all(|line| line.contains("Sent FetchRequest (v15,")), "{sent:?}");
    let hints = lines.copied().into_iter().filter(|line| line.starts_with("METADATAUPDATE"));
    assert_eq!(hints.collect::<Vec<_>>(), Vec::<String>::new(), "no answer to a fetch changed a leader");
}
