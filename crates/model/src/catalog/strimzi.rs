//! Export as Strimzi `KafkaTopic` resources, for clusters whose topics an operator of Kubernetes keeps.

use super::desired::Desired;
use super::name::kubernetes_name;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Two topics whose Kubernetes names are equal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topics `{first}` and `{second}` would both be the Kubernetes object `{name}`; rename one")]
pub struct NameCollision {
    name: String,
    first: String,
    second: String,
}

/// Writes one YAML document a topic, labelled for the Kafka cluster called `cluster`.
///
/// # Errors
/// [`NameCollision`].
pub fn export(desired: &Desired, cluster: &str) -> Result<String, NameCollision> {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let mut yaml = String::new();
    for topic in &desired.topics {
        let name = kubernetes_name(&topic.name);
        if let Some(first) = seen.insert(name.clone(), &topic.name) {
            return Err(NameCollision { name, first: first.to_owned(), second: topic.name.clone() });
        }
        write!(
            yaml,
            "---\napiVersion: kafka.strimzi.io/v1\nkind: KafkaTopic\nmetadata:\n  name: {name}\n  labels:\n    strimzi.io/cluster: {cluster}\nspec:\n  topicName: {topic_name}\n  partitions: {partitions}\n  replicas: {replicas}\n  config:\n",
            cluster = quoted(cluster),
            topic_name = quoted(&topic.name),
            partitions = topic.partitions,
            replicas = topic.replication,
        )
        .expect("writing to a string");
        for (key, value) in &topic.configs {
            writeln!(yaml, "    {key}: {}", scalar(value)).expect("writing to a string");
        }
    }
    Ok(yaml)
}

/// Numbers and booleans stay what they are; everything else is quoted. JSON strings are YAML strings.
fn scalar(value: &str) -> String {
    let is_plain = value.parse::<i64>().is_ok() || value == "true" || value == "false";
    if is_plain { value.to_owned() } else { quoted(value) }
}

fn quoted(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}
