//! Traces and metrics over OTLP/HTTP, received by a server of this test. One test, because a process has one
//! subscriber.

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::metrics::v1::{metric, number_data_point};
use prost::Message;
use std::sync::{Arc, Mutex};
use throughline_telemetry::spans::{self, BatchOf};
use throughline_telemetry::{Metric, TelemetryConfig, counter, histogram, init};

#[derive(Default)]
struct Received {
    traces: Vec<ExportTraceServiceRequest>,
    metrics: Vec<ExportMetricsServiceRequest>,
}

#[test]
fn what_is_measured_arrives_at_the_collector() {
    let received = Arc::new(Mutex::new(Received::default()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (traces, metrics) = (received.clone(), received.clone());
    let app = Router::new()
        .route(
            "/v1/traces",
            post(async move |body: Bytes| {
                traces.lock().unwrap().traces.push(ExportTraceServiceRequest::decode(body).unwrap());
            }),
        )
        .route(
            "/v1/metrics",
            post(async move |body: Bytes| {
                metrics.lock().unwrap().metrics.push(ExportMetricsServiceRequest::decode(body).unwrap());
            }),
        );
    runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });

    let config = TelemetryConfig {
        log: "warn".to_owned(),
        otlp_endpoint: Some(endpoint),
        trace_ratio: 0.0,
        instance: "test-1".to_owned(),
        ..TelemetryConfig::default()
    };
    let guard = init(&config).unwrap();
    let batch =
        BatchOf { topic: "device.telemetry.v1", partition: Some(3), group: "g", offset: Some(7), count: 9 };
    drop(spans::poll(batch));
    spans::failed(&spans::commit(batch), "TL-KAFKA-001", "the broker is away");
    drop(spans::send(BatchOf { topic: "device.command.v1", group: "", ..batch }));
    counter(Metric::MessagesTotal, &[("stage", "s"), ("outcome", "emitted")]).add(5);
    histogram(Metric::MessagingProcessDuration, &[("messaging_operation_name", "process")]).observe_n(0.5, 4);
    drop(guard);

    let received = received.lock().unwrap();
    let resource_spans: Vec<_> = received.traces.iter().flat_map(|request| &request.resource_spans).collect();
    let mut names: Vec<_> = resource_spans
        .iter()
        .flat_map(|spans| &spans.scope_spans)
        .flat_map(|scope| &scope.spans)
        .map(|span| span.name.clone())
        .collect();
    names.sort();
    assert_eq!(names, ["commit device.telemetry.v1", "send device.command.v1"], "failed and commands only");
    let attributes = &resource_spans[0].scope_spans[0].spans[0].attributes;
    for key in ["messaging.system", "messaging.operation.name", "messaging.batch.message_count", "error.type"]
    {
        assert!(
            attributes.iter().any(|attribute| attribute.key == key),
            "{key} is missing in {attributes:?}"
        );
    }

    let last = received.metrics.last().expect("the guard exports a last time");
    let families = &last.resource_metrics[0].scope_metrics[0].metrics;
    let named =
        |name: &str| families.iter().find(|family| family.name == name).unwrap().data.clone().unwrap();
    let metric::Data::Sum(sum) = named("messages_total") else { panic!("messages_total is no sum") };
    assert!(sum.is_monotonic);
    assert_eq!(sum.data_points[0].value, Some(number_data_point::Value::AsInt(5)));
    let metric::Data::Histogram(durations) = named("messaging.process.duration") else {
        panic!("no histogram")
    };
    let point = &durations.data_points[0];
    assert_eq!((point.count, point.sum), (4, Some(2.0)));
    assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
    let resource = last.resource_metrics[0].resource.as_ref().unwrap();
    assert!(resource.attributes.iter().any(|attribute| attribute.key == "service.instance.id"));
}
