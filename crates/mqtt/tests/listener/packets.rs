//! Splits and damage of what a client sends.

use super::support::*;
use proptest::prelude::*;
use std::io::Write as _;
use throughline_model::topics::DEVICE_TELEMETRY_V1;

/// What a conversation led to: the answers, and what was stored.
fn conversation(bytes: &[u8], cuts: &[usize]) -> (Vec<Option<Vec<u8>>>, usize) {
    let rig = Rig::start();
    // PUBACKs would race with the end of the conversation; what is stored tells as much.
    rig.memory.hold();
    let mut raw = rig.raw();
    raw.0.set_nodelay(true).expect("sets");
    let mut from = 0;
    for cut in cuts.iter().copied().chain([bytes.len()]) {
        if raw.0.write_all(&bytes[from..cut]).is_err() {
            break;
        }
        from = cut;
    }
    let _ = raw.0.shutdown(std::net::Shutdown::Write);
    let mut answers = Vec::new();
    loop {
        let answer = raw.read();
        let end = answer.is_none();
        answers.push(answer);
        if end {
            rig.memory.flow();
            return (answers, rig.memory.of(DEVICE_TELEMETRY_V1).len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_result_does_not_depend_on_how_bytes_are_split_over_reads(
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12), damage in any::<Option<(prop::sample::Index, u8)>>()
    ) {
        let mut bytes = [
            connect(4, "site-1/pump-7", 2, 0, &[]), publish(4, TOPIC, 1, &reading(1)),
            publish(4, TOPIC, 0, &reading(2)), vec![0xc0, 0], publish(4, "x", 2, b"y"),
        ].concat();
        if let Some((at, byte)) = damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
        cuts.sort_unstable();
        let whole = conversation(&bytes, &[]);
        let split = conversation(&bytes, &cuts);
        prop_assert_eq!(whole.1, split.1);
        prop_assert_eq!(whole.0, split.0);
    }
}
