//! The policies of the catalog that ask for replays by themselves, beside the stage that carries replays out.
//!
//! They run in the role `reprocess_dead_letters` because they are worth nothing without it and need no rights
//! that it does not have; the role `watch` only ever reads. Every member runs them: their requests have the
//! same ids, and what has one id is done once.

use crate::context::Context;
use std::sync::Arc;
use std::time::Duration;
use throughline_kafka::{AckedProducer, PartitionReader, TopicReader};
use throughline_model::catalog::ReplayPolicy;
use throughline_runtime::{PolicyPorts, ReplayPolicies, Shutdown, WallClock};
use throughline_telemetry::RoleHealth;

/// How often they look. The least quiet is 15 s, so nothing is gained by looking more often.
const INTERVAL: Duration = Duration::from_secs(1);

/// Does `work` with the policies beside it, until it returns or panics.
pub fn beside<T>(context: &Context, health: &RoleHealth, work: impl FnOnce() -> T) -> T {
    if context.replay_policies.is_empty() {
        return work();
    }
    let ended = Shutdown::new();
    std::thread::scope(|scope| {
        scope.spawn(|| look_until(context, health, &ended, context.replay_policies.to_vec()));
        // The scope waits for the thread, also where the work panics.
        let _at_the_end = Ended(ended.clone());
        work()
    })
}

/// Asks the thread to end when it is dropped.
struct Ended(Shutdown);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.request();
    }
}

fn look_until(context: &Context, health: &RoleHealth, ended: &Shutdown, policies: Vec<ReplayPolicy>) {
    let kafka = context.kafka();
    let names: Vec<String> = policies.iter().map(ReplayPolicy::name).collect();
    let ports = PolicyPorts {
        letters: PartitionReader::new(&kafka),
        tables: TopicReader::new(&kafka),
        outlet: AckedProducer::new(&kafka),
        schemas: context.registry(),
        codec: Arc::clone(&context.codec),
        clock: Arc::new(WallClock),
    };
    let mut policies = ReplayPolicies::new(policies, ports);
    let mut failing = false;
    while !ended.is_requested() {
        let looked = policies.look();
        if let Err(failure) = &looked
            && !failing
        {
            tracing::warn!("the policies of replays cannot look: {failure}; it is tried again");
        }
        failing = looked.is_err();
        let failure = looked.err().map(|failure| failure.to_string());
        health.note("replay_policies", serde_json::json!({"policies": names, "failure": failure}));
        let mut left = INTERVAL;
        while !left.is_zero() && !ended.is_requested() {
            let pause = left.min(Duration::from_millis(50));
            std::thread::sleep(pause);
            left -= pause;
        }
    }
}
