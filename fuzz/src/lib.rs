//! The bodies of the fuzz targets, one a parser that meets the network.
//!
//! They are plain functions over bytes without a dependency on the fuzzer, because `tests/tests/corpus.rs`
//! includes this file and replays the committed corpus with them in `make test`, on the stable compiler.
//! A body panics where a parser breaks its promise; docs/fuzzing.md lists the promises.

pub mod kafka;
pub mod letters;
pub mod mqtt;
pub mod registry;
pub mod stages;
pub mod text;
pub mod webhook;

/// A fuzz target.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also the name of its file in `fuzz_targets` and of its directory in
/// `corpus`.
pub const TARGETS: [(&str, Target); 17] = [
    ("books", kafka::books),
    ("configuration", text::configuration),
    ("envelope", kafka::envelope),
    ("expression", text::expression),
    ("headers", kafka::headers),
    ("ids", text::ids),
    ("json", mqtt::json),
    ("packets", mqtt::packets),
    ("publish", mqtt::publish),
    ("registry_answers", registry::registry_answers),
    ("registry_log", registry::registry_log),
    ("rule", text::rule),
    ("schema", kafka::schema),
    ("sequence_runs", kafka::sequence_runs),
    ("stages", stages::stages),
    ("topic_file", text::topic_file),
    ("webhook_answers", webhook::webhook_answers),
];

/// Parts an input at the first `at`; without one the second part is empty.
fn parted(data: &[u8], at: u8) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == at) {
        Some(place) => (&data[..place], &data[place + 1..]),
        None => (data, &[]),
    }
}
