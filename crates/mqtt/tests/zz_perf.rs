mod support;
use std::sync::Arc;
use throughline_model::catalog::Catalog;
use throughline_model::record::Outgoing;
use throughline_mqtt::generator::{self, Load};
use throughline_mqtt::*;
use throughline_runtime::ports::{Ingress, Refused};
struct Null(Arc<Inboxes>);
impl Ingress for Null {
    fn send(&self, r: Outgoing<'_>, token: u64) -> Result<(), Refused> {
        std::hint::black_box(r.value.map(<[u8]>::len));
        self.0.deliver(token, true);
        Ok(())
    }
    fn in_flight(&self) -> usize {
        0
    }
}
fn cpu(name: &str) -> f64 {
    let mut sum = 0.0;
    for t in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let s = std::fs::read_to_string(t.path().join("stat")).unwrap();
        if s.contains(name) {
            let f: Vec<&str> = s.rsplit(") ").next().unwrap().split(' ').collect();
            sum += (f[11].parse::<f64>().unwrap() + f[12].parse::<f64>().unwrap()) / 100.0;
        }
    }
    sum
}
#[test]
fn perf() {
    let catalog = Catalog::embedded();
    let codec = support::codec(&catalog);
    let router = Arc::new(Router::compile(&catalog).unwrap());
    let inboxes = Inboxes::new(1);
    let config = BridgeConfig {
        instance: "x".into(),
        listener: Some(ListenerConfig { address: ([127, 0, 0, 1], 0).into(), ..ListenerConfig::default() }),
        external: None,
    };
    let b = Bridge::start(
        &config,
        router,
        codec,
        Arc::new(Null(inboxes.clone())),
        inboxes,
        throughline_telemetry::Health::new().role("b"),
    )
    .unwrap();
    for (c, o, m) in [(50usize, 50usize, 10_000u64), (50, 200, 10_000), (1000, 10, 500)] {
        let before = cpu("mqtt-worker");
        let r = generator::run(&Load {
            address: b.local_addr().unwrap(),
            connections: c,
            open: o,
            messages_each: m,
            ..Load::default()
        })
        .unwrap();
        let used = cpu("mqtt-worker") - before;
        println!(
            "{c}x{o}: {:.0}/s worker {:.2} CPU-s/M p50 {:?} p99 {:?} failed {} {:?}",
            r.rate(),
            used / (r.acknowledged as f64 / 1e6),
            r.latency(0.5),
            r.latency(0.99),
            r.failed,
            r.first_failure
        );
    }
}
