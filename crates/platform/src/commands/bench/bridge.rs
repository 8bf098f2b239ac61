//! The bridge under the generator's load, beside a plain produce.

use super::place::Place;
use super::{Args, Line, limit, readings};
use crate::demo::resolve;
use crate::failure::CliError;
use crate::output;
use std::time::Duration;
use throughline_kafka::baseline;
use throughline_mqtt::generator::{self, Load};

/// First mark: CPU seconds of the bridge per million messages.
const CPU_MOST: f64 = 5.0;
/// Sent before anything is measured, so that the broker's code is compiled.
const WARM_UP_MOST: u64 = 100_000;
/// How long a page of the role may take to answer.
const PAGE: Duration = Duration::from_secs(1);

/// Measures the bridge.
///
/// # Errors
/// When it does not become ready or a publish is not acknowledged.
pub fn measure(place: &mut Place, args: &Args) -> Result<Vec<Line>, CliError> {
    let (mqtt, http) = Place::addresses()?;
    let mut role = place.start_role("bridge", &mqtt, &http)?;
    let ready = format!("http://{http}/readyz");
    let agent =
        ureq::Agent::new_with_config(ureq::config::Config::builder().timeout_global(Some(PAGE)).build());
    place.wait(&mut role, Duration::from_secs(60), || Ok(agent.get(&ready).call().is_ok()))?;

    let connections = usize::try_from(args.connections).unwrap_or(usize::MAX);
    let open = usize::try_from(args.open).unwrap_or(usize::MAX);
    let load = |epoch: u64, messages: u64| Load {
        connections,
        open,
        messages_each: messages.div_ceil(args.connections),
        epoch,
        ..Load::default()
    };
    let address = resolve(&mqtt)?;
    output::progress("bridge: warming up …");
    send(&Load { address, ..load(1, (args.messages / 5).min(WARM_UP_MOST)) })?;
    output::progress("bridge: measuring …");
    let processes = place.processes(Some(&role));
    let before = processes.spent();
    let report = send(&Load { address, ..load(2, args.messages) })?;
    let spent = processes.spent().since(&before);
    let millis = |quantile: f64| report.latency(quantile).as_secs_f64() * 1e3;
    let note = format!(
        "PUBACK p50 {:.1} ms, p99 {:.1} ms at {connections} connections x {open} open",
        millis(0.5),
        millis(0.99)
    );
    let bridge = Line::new("bridge", report.acknowledged, report.elapsed, spent).note(note).marked(CPU_MOST);
    drop(role);
    Ok(vec![bridge, plain_produce(place, args.messages)?])
}

fn send(load: &Load) -> Result<generator::Report, CliError> {
    let report = generator::run(load)?;
    match &report.first_failure {
        None => Ok(report),
        Some(why) => Err(CliError::failed(format!(
            "{} of {} connections failed, the first with: {why}",
            report.failed, load.connections
        ))),
    }
}

/// Writes as many records of the same form with a plain client, in this process.
fn plain_produce(place: &Place, messages: u64) -> Result<Line, CliError> {
    let samples = readings::samples(place)?;
    let kafka = place.context.kafka();
    let processes = place.processes(None);
    let before = processes.spent();
    let took = baseline::produce(&kafka, &samples, messages, limit(messages))?;
    let spent = processes.spent().since(&before);
    Ok(Line::new("  plain produce", messages, took, spent))
}
