//! Keeps librdkafka from leader hints (KIP-951), whose handling in 2.12.1 reads and writes memory that is not
//! its own (its issue 5280, open): an answer to a fetch that names some leaders and says of another partition
//! that it has none ends the process, or stores a leader that nobody named.
//!
//! The hints come with version 16 of Fetch and version 10 of Produce. librdkafka asks its own
//! `rd_kafka_broker_ApiVersion_supported` for the version to use; the linker puts the function below in its
//! place (`--wrap`, in `.cargo/config.toml`), which asks for one that has no hints. Leaders are then learnt from
//! metadata alone, as with brokers before 3.7.

use std::ffi::{c_int, c_void};

/// Keys of Kafka's protocol, each with the last version before the hints.
const PRODUCE: (i16, i16) = (0, 9);
const FETCH: (i16, i16) = (1, 15);

#[expect(unsafe_code, reason = "librdkafka's function, under the name that the linker's --wrap gives it")]
unsafe extern "C" {
    fn __real_rd_kafka_broker_ApiVersion_supported(
        broker: *mut c_void,
        key: i16,
        min: i16,
        max: i16,
        features: *mut c_int,
    ) -> i16;
}

#[expect(unsafe_code, reason = "librdkafka calls it in place of its own")]
// SAFETY: the linker gives the name its meaning; nothing else defines it.
#[unsafe(no_mangle)]
unsafe extern "C" fn __wrap_rd_kafka_broker_ApiVersion_supported(
    broker: *mut c_void,
    key: i16,
    min: i16,
    max: i16,
    features: *mut c_int,
) -> i16 {
    let last_without_hints = [PRODUCE, FETCH].into_iter().find(|(guarded, _)| *guarded == key);
    let max = last_without_hints.map_or(max, |(_, last)| max.min(last));
    // SAFETY: these are the arguments of the caller, but for a smaller version.
    unsafe { __real_rd_kafka_broker_ApiVersion_supported(broker, key, min, max, features) }
}

/// Does nothing, but a program that was linked without `--wrap` (because `RUSTFLAGS` hid
/// `.cargo/config.toml`, say) does not link at all instead of running without the guard.
pub fn require() {
    std::hint::black_box(__real_rd_kafka_broker_ApiVersion_supported as *const ());
    crate::coordinator::require();
}
