//! The real adapters pass the suites that the ports in memory pass.

use crate::common::*;
use throughline_kafka::{AckedProducer, GroupProtocol, KafkaConfig, TopicReader, TransactionalProducer};
use throughline_model::record::Outbox;
use throughline_runtime::ports::Outlet;
use throughline_testkit::conformance::{self, Surroundings};

#[test]
fn source_transactions_and_reader_conform_on_both_group_protocols() {
    for protocol in [GroupProtocol::Consumer, GroupProtocol::Classic] {
        let (input, output) = (topic("suite_in", 1, &[]), topic("suite_out", 1, &[]));
        let group = unique("suite");
        let config = KafkaConfig { group_protocol: protocol, ..config("one") };
        let mut source = join(&config, &group, &[&input]);
        let mut transactions = TransactionalProducer::new(&config, &group, source.membership());
        let mut reader = TopicReader::new(&config);
        let mut writer = AckedProducer::new(&config);
        let mut append = |key: &str, value: &str| {
            let mut outbox = Outbox::default();
            outbox.push(&input, Some(0), Some(key.as_bytes()), Some(value.as_bytes()), []);
            writer.send_all(&outbox).expect("acknowledged");
        };
        let around = Surroundings {
            group: &group,
            input: &input,
            output: &output,
            append: &mut append,
            reader: &mut reader,
        };
        conformance::source_and_transactions(&mut source, &mut transactions, around);
    }
}

#[test]
fn the_outlet_conforms() {
    let letters = topic("suite_letters", 1, &[]);
    let config = config("one");
    conformance::outlet(&mut AckedProducer::new(&config), &letters, &mut TopicReader::new(&config));
}
