//! The pages of a process over real HTTP.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use serde_json::{Value, json};
use std::time::{Duration, Instant};
use throughline_telemetry::{Health, Metric, counter, http};
use tokio::net::TcpListener;

/// Serves `health` on a free port and runs `check` with the base address on a thread of its own.
fn with_server(health: Health, check: impl FnOnce(&str)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = runtime.spawn(http::serve(listener, health, async move {
        stopped.await.ok();
    }));
    check(&base);
    stop.send(()).unwrap();
    runtime.block_on(server).unwrap().unwrap();
}

fn get(url: &str) -> (u16, String) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.get(url).call().unwrap();
    (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
}

#[test]
fn metrics_are_in_the_text_format() {
    counter(Metric::MqttPubacksTotal, &[("listener", "http-test")]).add(3);
    with_server(Health::new(), |base| {
        let answer = ureq::get(format!("{base}/metrics")).call().unwrap();
        assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        let text = answer.into_body().read_to_string().unwrap();
        assert!(text.contains("# TYPE mqtt_pubacks_total counter\n"), "{text}");
        assert!(text.contains("mqtt_pubacks_total{listener=\"http-test\"} 3\n"), "{text}");
        assert!(text.contains("throughline_build_info{version="), "{text}");
    });
}

#[test]
fn a_role_whose_loop_does_not_turn_is_named_until_it_turns_again() {
    let health = Health::with_stall_limit(Duration::from_millis(50));
    let role = health.role("evaluate_rules");
    with_server(health, |base| {
        let deadline = Instant::now() + Duration::from_secs(5);
        let (status, body) = loop {
            let answer = get(&format!("{base}/healthz"));
            if answer.0 == 503 || Instant::now() > deadline {
                break answer;
            }
        };
        assert_eq!(status, 503);
        assert!(body.starts_with("role evaluate_rules is stuck: its loop has not turned for "), "{body}");
        role.turned();
        assert_eq!(get(&format!("{base}/healthz")), (200, "ok\n".to_owned()));
    });
}

#[test]
fn a_dependency_that_is_down_changes_readiness_only_where_the_role_says_so() {
    let health = Health::new();
    let role = health.role("bridge");
    with_server(health, |base| {
        let ready = format!("{base}/readyz");
        assert_eq!(get(&ready), (503, "role bridge is not ready: starting\n".to_owned()));
        role.ready(true, "");
        role.dependency("kafka", false, "all brokers down");
        assert_eq!(get(&ready).0, 200, "the bridge still holds its clients");
        role.ready(false, "the buffer is full");
        assert_eq!(get(&ready), (503, "role bridge is not ready: the buffer is full\n".to_owned()));
        assert_eq!(get(&format!("{base}/healthz")).0, 200);
        let metrics = get(&format!("{base}/metrics")).1;
        assert!(metrics.contains("dependency_up{role=\"bridge\",dependency=\"kafka\"} 0\n"), "{metrics}");
    });
}

#[test]
fn status_tells_everything_at_once() {
    let health = Health::new();
    let role = health.role("update_twin");
    role.ready(true, "");
    role.dependency("kafka", true, "");
    role.note("in_flight", json!(17));
    with_server(health, |base| {
        let began = Instant::now();
        let (status, body) = get(&format!("{base}/v1/status"));
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!(status, 200);
        let value: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(value["schema"], "throughline.status/1");
        assert_eq!(value["pid"], std::process::id());
        assert_eq!((value["alive"].clone(), value["ready"].clone()), (json!(true), json!(true)));
        let role = &value["roles"]["update_twin"];
        assert_eq!(role["notes"]["in_flight"], 17);
        assert_eq!(role["dependencies"]["kafka"]["up"], true);
        assert!(role["last_turn_seconds"].is_f64());
    });
}
