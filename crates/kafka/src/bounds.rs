//! Asks for the first and last positions of partitions.

use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::error::RDKafkaErrorCode as Code;
use std::time::{Duration, Instant};
use throughline_kafka_ffi::{self as ffi, Entry, OffsetSpec};

const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Returns offsets of many partitions; an error of one partition is in its entry.
///
/// Where a partition's leader is not, or not yet, what the client believes, it asks again until `within` is
/// over. librdkafka answers from what it remembers of the cluster and does not look again after such an error:
/// without a new look a client that was connected while the broker restarted meets `FencedLeaderEpoch` for
/// minutes.
pub(crate) fn list_offsets<C: ClientContext>(
    client: &Client<C>,
    partitions: &[(&str, i32)],
    spec: OffsetSpec,
    committed_only: bool,
    within: Duration,
) -> Result<Vec<Entry>, ffi::Error> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut found = ffi::list_offsets(client, partitions, spec, committed_only, left)?;
        if !matches!(spec, OffsetSpec::AtOrAfter(_)) {
            found.iter_mut().for_each(refuse_none);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left <= ASK_AGAIN || !found.iter().any(|entry| entry.error.is_some_and(is_stale)) {
            return Ok(found);
        }
        std::thread::sleep(ASK_AGAIN);
        // Its answer is in what the client remembers; an error shows in the next answer.
        let looked = client.fetch_metadata(None, left - ASK_AGAIN);
        looked.map_or_else(|e| tracing::debug!("cannot look at the cluster again: {e}"), drop);
    }
}

/// Every partition has a first and a last position; a broker that is about to lead one may say that it has none.
/// Taken as it is, that would make a table look empty.
fn refuse_none(entry: &mut Entry) {
    if entry.offset < 0 {
        entry.error.get_or_insert(Code::OffsetNotAvailable);
    }
}

/// Says whether the client's idea of a partition's leader may be old.
pub(crate) fn is_stale(code: Code) -> bool {
    matches!(
        code,
        Code::NotLeaderForPartition
            | Code::LeaderNotAvailable
            | Code::FencedLeaderEpoch
            | Code::UnknownLeaderEpoch
            | Code::OffsetNotAvailable
    )
}
