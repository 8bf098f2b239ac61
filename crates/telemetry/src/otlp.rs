//! Export over OTLP/HTTP: traces through OpenTelemetry's SDK, metrics straight from the table of series.
//!
//! Metrics are not recorded a second time in OpenTelemetry instruments: those look their attributes up at
//! each measurement and have no observable histogram. What `/metrics` shows is translated as it is.

use crate::metrics::{FamilySnapshot, Value, snapshot};
use crate::subscriber::{TelemetryConfig, TelemetryError};
use opentelemetry::trace::Status;
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, InstrumentationScope, KeyValue as ProtoKeyValue, any_value,
};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
    ScopeMetrics, Sum, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource as ProtoResource;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, Sampler, SdkTracerProvider, Span, SpanData, SpanProcessor,
};
use prost::Message;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long one export may take, and how long the end of the process waits for the last one.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// Makes the provider whose spans go to `<endpoint>/v1/traces`.
pub(crate) fn tracer_provider(
    endpoint: &str,
    config: &TelemetryConfig,
) -> Result<SdkTracerProvider, TelemetryError> {
    let refused = |message: String| TelemetryError::Endpoint { endpoint: endpoint.to_owned(), message };
    check_endpoint(endpoint).map_err(refused)?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .with_timeout(TIMEOUT)
        .build()
        .map_err(|error| refused(error.to_string()))?;
    let processor = Tail { inner: BatchSpanProcessor::builder(exporter).build(), ratio: config.trace_ratio };
    let resource = resource_attributes(config).into_iter().map(|(key, value)| KeyValue::new(key, value));
    Ok(SdkTracerProvider::builder()
        .with_sampler(Sampler::AlwaysOn)
        .with_span_processor(processor)
        .with_resource(Resource::builder().with_attributes(resource).build())
        .build())
}

/// Decides at the end of a span whether it is exported: a sampler at its beginning cannot know that it will
/// fail. Spans cover batches, so recording all of them is cheap.
#[derive(Debug)]
struct Tail {
    inner: BatchSpanProcessor,
    ratio: f64,
}

impl SpanProcessor for Tail {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        let failed = matches!(span.status, Status::Error { .. });
        if failed || is_command(&span) || in_sample(span.span_context.trace_id().to_bytes(), self.ratio) {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Commands are few and people wait for them, so each is traced.
fn is_command(span: &SpanData) -> bool {
    let attribute = span.attributes.iter().find(|a| a.key.as_str() == "messaging.destination.name");
    attribute.is_some_and(|a| a.value.as_str().contains(".command."))
}

/// The low 8 bytes of a trace id are random; all spans of a trace get the same answer in every process.
fn in_sample(trace_id: [u8; 16], ratio: f64) -> bool {
    let random = u64::from_be_bytes(std::array::from_fn(|i| trace_id[8 + i]));
    (random as f64) < ratio * (u64::MAX as f64) || ratio >= 1.0
}

/// A thread that posts the metrics to `<endpoint>/v1/metrics` at an interval.
#[derive(Debug)]
pub(crate) struct MetricsExporter {
    /// Dropping it ends the thread after a last export.
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl MetricsExporter {
    pub(crate) fn start(endpoint: &str, config: &TelemetryConfig) -> Result<Self, TelemetryError> {
        let refused = |message: String| TelemetryError::Endpoint { endpoint: endpoint.to_owned(), message };
        check_endpoint(endpoint).map_err(refused)?;
        let url = format!("{}/v1/metrics", endpoint.trim_end_matches('/'));
        let resource = resource_attributes(config);
        let interval = Duration::from_secs(config.metrics_interval_seconds.max(1));
        let (stop, stopped) = channel::<()>();
        let started_ns = now_ns();
        let body = move || {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).build().into();
            let mut failing = false;
            loop {
                let last = stopped.recv_timeout(interval) != Err(RecvTimeoutError::Timeout);
                let request = export_request(&snapshot(), &resource, started_ns, now_ns());
                let sent = agent
                    .post(&url)
                    .content_type("application/x-protobuf")
                    .send(&request.encode_to_vec()[..]);
                // A receiver that is away is said once, not every interval.
                match sent {
                    Ok(_) => failing = false,
                    Err(error) if !failing => {
                        failing = true;
                        tracing::warn!(%error, url, "metrics cannot be exported; they stay on /metrics");
                    }
                    Err(_) => {}
                }
                if last {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("otlp-metrics".to_owned()).spawn(body);
        Ok(Self { stop, thread: thread.map_err(|error| refused(error.to_string()))? })
    }

    /// Exports a last time and ends.
    pub(crate) fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::warn!("the exporter of metrics had panicked");
        }
    }
}

fn check_endpoint(endpoint: &str) -> Result<(), String> {
    if endpoint.starts_with("http://") || endpoint.starts_with("https://") {
        return Ok(());
    }
    Err("it shall begin with http:// or https://, for instance http://127.0.0.1:4318".to_owned())
}

fn resource_attributes(config: &TelemetryConfig) -> Vec<(&'static str, String)> {
    vec![
        ("service.name", config.service_name.clone()),
        ("service.instance.id", config.instance.clone()),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
    ]
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn export_request(
    families: &[FamilySnapshot],
    resource: &[(&'static str, String)],
    started_ns: u64,
    now_ns: u64,
) -> ExportMetricsServiceRequest {
    let metrics = families.iter().map(|family| metric_of(family, started_ns, now_ns)).collect();
    let scope = InstrumentationScope { name: "throughline".to_owned(), ..InstrumentationScope::default() };
    let attributes = resource.iter().map(|(key, value)| attribute(key, value)).collect();
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(ProtoResource { attributes, ..ProtoResource::default() }),
            scope_metrics: vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }],
            ..ResourceMetrics::default()
        }],
    }
}

fn metric_of(family: &FamilySnapshot, started_ns: u64, now_ns: u64) -> Metric {
    let definition = family.definition;
    let mut numbers = Vec::new();
    let mut histograms = Vec::new();
    for (values, value) in &family.series {
        let attributes =
            definition.labels.iter().zip(values).map(|(key, value)| attribute(key, value)).collect();
        let number = |value| NumberDataPoint {
            start_time_unix_nano: started_ns,
            time_unix_nano: now_ns,
            value: Some(value),
            ..NumberDataPoint::default()
        };
        match value {
            Value::Counter(count) => {
                // OTLP's integers are signed; a counter would take 292 years at 1 GHz to get there.
                let count = i64::try_from(*count).unwrap_or(i64::MAX);
                numbers
                    .push(NumberDataPoint { attributes, ..number(number_data_point::Value::AsInt(count)) });
            }
            Value::Gauge(gauge) => {
                numbers.push(NumberDataPoint {
                    attributes,
                    ..number(number_data_point::Value::AsDouble(*gauge))
                });
            }
            Value::Histogram { bounds, counts, sum } => histograms.push(HistogramDataPoint {
                attributes,
                start_time_unix_nano: started_ns,
                time_unix_nano: now_ns,
                count: counts.iter().sum(),
                sum: Some(*sum),
                bucket_counts: counts.clone(),
                explicit_bounds: bounds.to_vec(),
                ..HistogramDataPoint::default()
            }),
        }
    }
    let cumulative = AggregationTemporality::Cumulative as i32;
    let data = match definition.kind {
        crate::names::Kind::Counter => metric::Data::Sum(Sum {
            data_points: numbers,
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        crate::names::Kind::Gauge => metric::Data::Gauge(Gauge { data_points: numbers }),
        crate::names::Kind::Histogram(_) => metric::Data::Histogram(Histogram {
            data_points: histograms,
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: definition.otlp_name.to_owned(),
        description: definition.help.to_owned(),
        unit: definition.unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn attribute(key: &str, value: &str) -> ProtoKeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    ProtoKeyValue { key: key.to_owned(), value: Some(value), ..ProtoKeyValue::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_follows_the_random_half_of_the_trace_id() {
        let mut low = [0xff; 16];
        low[8..].fill(0);
        let mut high = [0; 16];
        high[8..].fill(0xff);
        assert!(in_sample(low, 0.01) && !in_sample(high, 0.99));
        assert!(in_sample(high, 1.0) && !in_sample(low, 0.0));
    }
}
