//! Asks which cluster and which topics these are.

use crate::admin::Admin;
use crate::config::KafkaConfig;
use crate::failure::dependency;
use base64::Engine;
use std::collections::HashMap;
use throughline_runtime::ports::Failure;
use throughline_runtime::{AskIncarnation, Incarnation};
use uuid::Uuid;

/// Returns what asks for the ids of the cluster, of `topics`, and of the changelog where there is one.
pub fn ask_incarnation(config: &KafkaConfig, topics: &[&str], changelog: Option<&str>) -> AskIncarnation {
    let topics: Vec<String> = topics.iter().copied().chain(changelog).map(str::to_owned).collect();
    let config = config.clone();
    AskIncarnation::new(move || ask(&config, &topics))
}

/// Asks the cluster with a client of its own: one that lives on remembers the id of its first cluster.
fn ask(config: &KafkaConfig, topics: &[String]) -> Result<Incarnation, Failure> {
    let admin = Admin::new(config)?;
    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
    let mut topic_ids = HashMap::new();
    for (topic, id) in admin.topic_ids(&names)? {
        let id = topic_id(&id)
            .ok_or_else(|| dependency(format!("the cluster gives `{id}` as the id of topic `{topic}`")))?;
        topic_ids.insert(topic, id);
    }
    Ok(Incarnation { cluster_id: admin.cluster_id()?, topic_ids })
}

/// Reads a topic id in base64 without padding: librdkafka writes `+` and `/` where Kafka's tools write `-`
/// and `_`.
fn topic_id(text: &str) -> Option<Uuid> {
    let standard = text.replace('-', "+").replace('_', "/");
    let bytes = base64::engine::general_purpose::STANDARD_NO_PAD.decode(standard).ok()?;
    Uuid::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_ids_of_both_alphabets_read_as_the_same_bytes() {
        let id = topic_id("m/7ck3RhTTa/MZ68v9ORQg").expect("as librdkafka writes it");
        assert_eq!(topic_id("m_7ck3RhTTa_MZ68v9ORQg"), Some(id));
        assert_eq!(topic_id("short"), None);
    }
}
