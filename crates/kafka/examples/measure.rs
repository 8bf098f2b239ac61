//! Measures the adapter against a broker: `cargo run --release -p throughline-kafka --example measure --
//! 127.0.0.1:9092 [records]`. Makes topics `measure_*` and leaves them there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_kafka::admin::{Admin, NewTopic};
use throughline_kafka::{AckedProducer, BatchBounds, GroupSource, KafkaConfig, TransactionalProducer};
use throughline_model::books::Books;
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Advance, Failure, Outlet, PipelineEvent, Source, Transactions};

#[expect(clippy::print_stdout, reason = "a tool that prints what it measured")]
fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let bootstrap = arguments.next().unwrap_or_else(|| "127.0.0.1:9092".to_owned());
    let total: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(1_000_000);
    let config = KafkaConfig::new(bootstrap);
    let stamp = std::process::id();
    let topic = |what: &str| -> Arc<str> { format!("measure_{what}_{stamp}").into() };
    let (input, output, group) = (topic("in"), topic("out"), format!("measure_{stamp}"));
    let new = |name: &Arc<str>| NewTopic {
        name: name.to_string(),
        partitions: 2,
        replication: 1,
        configs: BTreeMap::new(),
    };
    Admin::new(&config)?.create_topics(&[new(&input), new(&output)])?;
    let mut outlet = AckedProducer::new(&config);
    let payload = [7_u8; 174];
    let (cpu, begun) = (cpu_seconds(), Instant::now());
    for from in (0..total).step_by(10_000) {
        let mut outbox = Outbox::default();
        for i in from..total.min(from + 10_000) {
            outbox.push(&input, Some((i % 2) as i32), Some(&i.to_le_bytes()), Some(&payload), []);
        }
        outlet.send_all(&outbox)?;
    }
    println!("produce, waiting each 10,000: {}", rate(total, cpu, begun));

    let mut source = GroupSource::join(&config, &group, &[&input], BatchBounds::default())?;
    let mut producer = TransactionalProducer::new(&config, &group, source.membership());
    producer.reset()?;
    for copying in [false, true] {
        let (mut cpu, mut begun) = (cpu_seconds(), Instant::now());
        let (mut read, mut commits) = (0, Vec::new());
        let books = Books::open("v");
        let mut outbox = Outbox::default();
        if copying {
            let again = [0, 1].map(|p| (throughline_model::record::TopicPartition::new(&*input, p), 0));
            source.start(&again)?;
        }
        while read < total {
            match source.poll(Duration::from_millis(100)) {
                PipelineEvent::Offered(list) => {
                    let starts: Vec<_> = list.into_iter().map(|p| (p, 0)).collect();
                    source.start(&starts)?;
                    (cpu, begun) = (cpu_seconds(), Instant::now());
                }
                PipelineEvent::Records(batch) => {
                    read += batch.len();
                    if copying {
                        outbox.clear();
                        for record in batch.iter() {
                            let p = Some(batch.source.partition);
                            outbox.push(&output, p, record.key, record.value, record.headers.iter());
                        }
                        producer.send(&outbox)?;
                        let to = batch.get(batch.len() - 1).offset + 1;
                        let books = books.clone();
                        let step = Advance { partition: batch.source.clone(), from: 0, to, books };
                        let commit = Instant::now();
                        producer.commit(&[step])?;
                        commits.push(commit.elapsed());
                    }
                }
                _ => {}
            }
        }
        let what = if copying { "copy, a transaction a batch" } else { "consume" };
        println!("{what}: {}", rate(total, cpu, begun));
        percentiles("  commit of a whole batch", &mut commits);
    }
    let mut commits = Vec::new();
    for i in 0..300 {
        let mut outbox = Outbox::default();
        outbox.push(&output, None, Some(b"k"), Some(&payload), []);
        producer.send(&outbox)?;
        let partition = throughline_model::record::TopicPartition::new(&*input, 0);
        let step = Advance { partition, from: 0, to: i, books: Books::open("v") };
        let commit = Instant::now();
        producer.commit(&[step])?;
        commits.push(commit.elapsed());
    }
    percentiles("commit of one record and one offset", &mut commits);
    source.leave(Duration::from_secs(10));
    Ok(())
}

fn rate(records: usize, cpu: f64, begun: Instant) -> String {
    let seconds = begun.elapsed().as_secs_f64();
    let millions = records as f64 / 1e6;
    format!(
        "{:.0} k records/s, {:.2} CPU-s per million",
        millions * 1e3 / seconds,
        (cpu_seconds() - cpu) / millions
    )
}

#[expect(clippy::print_stdout, reason = "a tool that prints what it measured")]
fn percentiles(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    if let (Some(p50), Some(p99)) = (times.get(times.len() / 2), times.get(times.len() * 99 / 100)) {
        println!("{what}: p50 {:.1} ms, p99 {:.1} ms", p50.as_secs_f64() * 1e3, p99.as_secs_f64() * 1e3);
    }
}

/// Returns the user and system time of this process; Linux counts it in ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}
