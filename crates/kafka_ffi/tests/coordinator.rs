//! Questions to a coordinator end, on librdkafka's own mock cluster (issues 3663, 4605, 5456 and 5511).

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::mocking::{MockCluster, MockCoordinator};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use throughline_kafka_ffi::group_offsets;

const DEADLINE: Duration = Duration::from_secs(60);
/// The broker that coordinates, and is not there.
const AWAY: i32 = 2;

fn consumer(servers: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", servers).set("group.id", "own").create().expect("a consumer")
}

#[test]
fn a_coordinator_that_comes_after_its_question_was_given_up_disturbs_nothing() {
    throughline_kafka_ffi::guard::require();
    let cluster = MockCluster::new(2).expect("a mock cluster");
    cluster.coordinator(MockCoordinator::Group("away".to_owned()), AWAY).expect("a coordinator");
    cluster.coordinator(MockCoordinator::Group("own".to_owned()), 1).expect("a coordinator");
    cluster.broker_down(AWAY).expect("a broker goes");
    let consumer = consumer(&cluster.bootstrap_servers());
    let ask = |timeout| group_offsets(consumer.client(), &["away"], timeout);
    for _ in 0..3 {
        let code = ask(Duration::from_millis(700)).expect_err("nobody answers").code;
        assert_eq!(code, RDKafkaErrorCode::OperationTimedOut);
    }
    // What was given up is looked at when the coordinator is reached, before the next question. The client has
    // learnt meanwhile that there is no such broker, and must learn that there is one again.
    cluster.broker_up(AWAY).expect("a broker comes");
    let end = Instant::now() + DEADLINE;
    while ask(Duration::from_secs(1)) != Ok(vec![("away".to_owned(), Ok(Vec::new()))]) {
        assert!(Instant::now() < end, "the coordinator that is back does not answer");
    }
}

#[test]
fn offsets_in_a_transaction_are_given_up_in_time_where_no_coordinator_is_reached() {
    throughline_kafka_ffi::guard::require();
    let cluster = MockCluster::new(2).expect("a mock cluster");
    cluster.create_topic("t", 1, 1).expect("a topic");
    cluster.coordinator(MockCoordinator::Transaction("x".to_owned()), 1).expect("a coordinator");
    cluster.coordinator(MockCoordinator::Group("own".to_owned()), AWAY).expect("a coordinator");
    let servers = cluster.bootstrap_servers();
    let consumer = consumer(&servers);
    let member = consumer.group_metadata().expect("a consumer with a group");
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &servers).set("transactional.id", "x").set("socket.timeout.ms", "2000");
    let producer: Arc<BaseProducer> = Arc::new(config.create().expect("a producer"));
    producer.init_transactions(DEADLINE).expect("initialises");
    cluster.broker_down(AWAY).expect("a broker goes");
    producer.begin_transaction().expect("begins");

    let (told, answer) = mpsc::channel();
    let sender = Arc::clone(&producer);
    std::thread::spawn(move || {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset("t", 0, Offset::Offset(7)).expect("an offset");
        let sent = sender.send_offsets_to_transaction(&offsets, &member, Duration::from_secs(5));
        told.send(sent).expect("the test waits");
    });
    let sent = answer.recv_timeout(DEADLINE).expect("the call comes back");
    let Err(KafkaError::Transaction(error)) = sent else { panic!("offsets that nobody took: {sent:?}") };
    assert!(error.txn_requires_abort() && !error.is_fatal(), "the transaction can be ended: {error:?}");
    producer.abort_transaction(DEADLINE).expect("aborts");

    // The question that was given up is met by the coordinator now; the next transaction is whole.
    cluster.broker_up(AWAY).expect("a broker comes");
    producer.begin_transaction().expect("begins");
    let mut offsets = TopicPartitionList::new();
    offsets.add_partition_offset("t", 0, Offset::Offset(8)).expect("an offset");
    let member = consumer.group_metadata().expect("a consumer with a group");
    producer.send_offsets_to_transaction(&offsets, &member, DEADLINE).expect("the coordinator is back");
    producer.commit_transaction(DEADLINE).expect("commits");
}
