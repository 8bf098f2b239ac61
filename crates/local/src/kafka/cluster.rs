//! A real Apache Kafka of one node or several, for tests that take one of them away.

use super::{KafkaOptions, ManagedKafka, Seat, new_cluster_id};
use crate::artifacts::Notice;
use crate::child::Fault;
use crate::error::LocalError;
use crate::ports;
use std::process::Command;

/// What a cluster of several nodes has: every partition on three of them, and a write is acknowledged when two
/// have it, as docs and Kubernetes files ask of production.
const SEVERAL: &[(&str, &str)] = &[
    ("default.replication.factor", "3"),
    ("min.insync.replicas", "2"),
    ("unclean.leader.election.enable", "false"),
    ("offsets.topic.replication.factor", "3"),
    ("transaction.state.log.replication.factor", "3"),
    ("transaction.state.log.min.isr", "2"),
    ("share.coordinator.state.topic.replication.factor", "3"),
    ("share.coordinator.state.topic.min.isr", "2"),
    // A node that hangs is fenced after 6 s instead of 9, so that a short run meets what follows.
    ("broker.session.timeout.ms", "6000"),
];

/// Brokers of one cluster, each also a controller. Dropping it kills them.
#[derive(Debug)]
pub struct KafkaCluster {
    nodes: Vec<ManagedKafka>,
}

impl KafkaCluster {
    /// Starts `nodes` brokers (1, or 3 and more) in directories below that of `options` and returns when all
    /// of them serve their clients.
    ///
    /// # Errors
    /// As [`ManagedKafka::start`].
    ///
    /// # Panics
    /// When a thread that starts a node panics.
    pub fn start(options: &KafkaOptions, nodes: u32, notice: Notice<'_>) -> Result<Self, LocalError> {
        if nodes <= 1 {
            return Ok(Self { nodes: vec![ManagedKafka::start(options.clone(), notice)?] });
        }
        let controllers = (0..nodes).map(|_| ports::free()).collect::<Result<Vec<_>, _>>()?;
        let cluster_id = new_cluster_id();
        let seats = (1..=nodes).map(|node| {
            let mut seated = options.clone();
            seated.data_dir = options.data_dir.join(node.to_string());
            let several = SEVERAL.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            seated.settings = several.chain(seated.settings).collect();
            let (cluster_id, controllers) = (cluster_id.clone(), controllers.clone());
            seated.seat = Some(Seat { cluster_id, node, controllers });
            seated
        });
        // None is ready before most of them vote, so they start side by side.
        let starts: Vec<_> =
            seats.map(|seated| std::thread::spawn(|| ManagedKafka::start(seated, &mut |_| {}))).collect();
        let started = starts.into_iter().map(|start| start.join().expect("starting a node does not panic"));
        Ok(Self { nodes: started.collect::<Result<_, _>>()? })
    }

    /// Returns the bootstrap servers.
    pub fn bootstrap(&self) -> String {
        let all: Vec<String> = self.nodes.iter().map(ManagedKafka::bootstrap).collect();
        all.join(",")
    }

    /// Returns how many nodes there are.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Returns the ports of the nodes' listeners.
    pub fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(ManagedKafka::port).collect()
    }

    /// Returns one node, counted from 0 and around.
    pub fn node(&mut self, index: usize) -> &mut ManagedKafka {
        let count = self.nodes.len();
        &mut self.nodes[index % count]
    }

    /// Does a fault to every node. After [`Fault::Kill`] go on with [`KafkaCluster::restart`].
    pub fn fault(&mut self, fault: Fault) {
        for node in &mut self.nodes {
            node.fault(fault);
        }
    }

    /// Starts every node again on its port and data, side by side, ending in order before what runs.
    ///
    /// # Errors
    /// As [`ManagedKafka::start`].
    ///
    /// # Panics
    /// When a thread that starts a node panics.
    pub fn restart(&mut self) -> Result<(), LocalError> {
        std::thread::scope(|scope| {
            let starts: Vec<_> = self.nodes.iter_mut().map(|node| scope.spawn(|| node.restart())).collect();
            starts.into_iter().try_for_each(|start| start.join().expect("starting a node does not panic"))
        })
    }

    /// As [`ManagedKafka::tool`].
    ///
    /// # Errors
    /// As [`ManagedKafka::tool`].
    pub fn tool(&self, class: &str) -> Result<Command, LocalError> {
        self.nodes[0].tool(class)
    }
}
