//! The connections to an existing broker, one after the other, each with a client of its own: what one left
//! behind, its acknowledgements above all, never reaches the next.

use crate::config::{BridgeError, ExternalConfig, read_secret};
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet, Publish, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long the broker may take to close the connection after our DISCONNECT.
pub(super) const FAREWELL: Duration = Duration::from_millis(300);

/// What happened to a connection.
pub(super) enum Status {
    /// The broker accepted it; acknowledgements go to its client.
    Connected(AsyncClient),
    /// The broker granted every subscription.
    Subscribed,
    /// It is over.
    Failed(String),
}

/// Where a connection reports to; everything carries its number.
pub(super) struct Reports {
    /// A channel of its own, because publishes wait in theirs until there is room. A connection says three
    /// things at most, and connections have a back-off, so it needs no bound.
    pub(super) status: mpsc::UnboundedSender<(u64, Status)>,
    pub(super) publishes: mpsc::Sender<(u64, Publish)>,
}

/// Reads the configuration.
pub(super) fn options(config: &ExternalConfig, client_id: &str) -> Result<MqttOptions, BridgeError> {
    let wrong = |why: &str| BridgeError::Config { key: "external.url".to_owned(), why: why.to_owned() };
    let rest = config.url.strip_prefix("mqtt://").ok_or_else(|| wrong("has the form `mqtt://host:port`"))?;
    let (host, port) = match rest.trim_end_matches('/').rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| wrong("has a port that is not a number"))?),
        None => (rest.trim_end_matches('/'), 1883),
    };
    if host.is_empty() {
        return Err(wrong("names no host"));
    }
    let mut options = MqttOptions::new(client_id, host, port);
    options
        .set_keep_alive(Duration::from_secs(u64::from(config.keep_alive_s.max(5))))
        .set_clean_start(false)
        .set_manual_acks(true)
        .set_connection_timeout(10)
        .set_session_expiry_interval(Some(config.session_expiry_s))
        .set_receive_maximum(Some(config.open_publishes_max.max(1)))
        .set_max_packet_size(Some(config.packet_bytes_max))
        // We publish nothing, and the client reserves room for each.
        .set_outgoing_inflight_upper_limit(1);
    match (&config.user, &config.password_file) {
        (Some(user), Some(path)) => {
            let password = read_secret("external.password_file", path)?;
            options.set_credentials(user.clone(), password);
        }
        (None, None) => {}
        _ => {
            let why = "needs `external.password_file` beside it, and the other way round".to_owned();
            return Err(BridgeError::Config { key: "external.user".to_owned(), why });
        }
    }
    Ok(options)
}

/// Returns the shared subscriptions of a group.
pub(super) fn filters(group: &str, subscriptions: &[String]) -> Vec<Filter> {
    let shared = |filter: &String| Filter::new(format!("$share/{group}/{filter}"), QoS::AtLeastOnce);
    subscriptions.iter().map(shared).collect()
}

/// Connects again and again with bounded back-off, until nobody hears the reports. `requests_max` is how many
/// acknowledgements a client holds.
pub(super) async fn run(options: MqttOptions, requests_max: usize, filters: Vec<Filter>, reports: Reports) {
    let mut backoff = BACKOFF_FIRST;
    for number in 1.. {
        let (client, events) = AsyncClient::new(options.clone(), requests_max);
        let began = Instant::now();
        let (why, acknowledged) = one(number, events, &client, &filters, &reports).await;
        if reports.status.send((number, Status::Failed(why))).is_err() {
            return;
        }
        // A connection that was only opened shows nothing: a message that Kafka does not take ends each one
        // at once, and the broker is not to be hammered for it.
        let served = acknowledged || began.elapsed() >= BACKOFF_MAX;
        let (pause, next) = pauses(backoff, served);
        backoff = next;
        tokio::time::sleep(pause).await;
    }
}

/// Returns the pause after a connection and, should the next one end too, the pause after that: doubling, and
/// from the beginning once a connection `served`.
fn pauses(backoff: Duration, served: bool) -> (Duration, Duration) {
    let pause = if served { BACKOFF_FIRST } else { backoff };
    (pause, (pause * 2).min(BACKOFF_MAX))
}

/// Serves one connection to its end. Returns why it ended and whether anything was acknowledged on it.
async fn one(
    number: u64,
    mut events: EventLoop,
    client: &AsyncClient,
    filters: &[Filter],
    reports: &Reports,
) -> (String, bool) {
    let mut acknowledged = false;
    let why = loop {
        let status = match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                if let Err(e) = client.try_subscribe_many(filters.to_vec()) {
                    break format!("cannot subscribe: {e}");
                }
                Status::Connected(client.clone())
            }
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                let refused =
                    ack.return_codes.iter().position(|c| !matches!(c, SubscribeReasonCode::Success(_)));
                if let Some(at) = refused {
                    // The broker may send all the same, for a session that it kept. So the connection ends,
                    // and what it has sent counts no more against what may be open.
                    break format!(
                        "the broker refuses subscription `{}`: {:?}",
                        filters.get(at).map_or("", |f| f.path.as_str()),
                        ack.return_codes[at]
                    );
                }
                Status::Subscribed
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                if reports.publishes.send((number, publish)).await.is_err() {
                    break "the bridge has ended".to_owned();
                }
                continue;
            }
            Ok(Event::Outgoing(Outgoing::PubAck(_))) => {
                acknowledged = true;
                continue;
            }
            Ok(Event::Outgoing(Outgoing::Disconnect)) => {
                // To close with bytes unread would reset the connection, and the broker might miss what we
                // acknowledged.
                let rest = async { while events.poll().await.is_ok() {} };
                let _ = tokio::time::timeout(FAREWELL, rest).await;
                break "Kafka did not take a message, and the broker sends again only to a new connection"
                    .to_owned();
            }
            Ok(_) => continue,
            Err(e) => break e.to_string(),
        };
        if reports.status.send((number, status)).is_err() {
            break "the bridge has ended".to_owned();
        }
    };
    (why, acknowledged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_before_a_reconnect_doubles_up_to_its_bound_and_begins_anew_after_service() {
        let mut backoff = BACKOFF_FIRST;
        let mut next = |served| {
            let (pause, after) = pauses(backoff, served);
            backoff = after;
            pause.as_millis()
        };
        let in_vain: Vec<u128> = (0..10).map(|_| next(false)).collect();
        assert_eq!(in_vain, [200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
        assert_eq!([next(true), next(false), next(false)], [200, 400, 800]);
    }

    #[test]
    fn a_broker_that_cannot_be_named_is_refused_with_the_form() {
        for (url, user, why) in [
            ("broker:1883", None, "mqtt://host:port"),
            ("mqtt://", None, "no host"),
            ("mqtt://h:x", None, "not a number"),
            ("mqtt://h", Some("u"), "password_file"),
        ] {
            let user = user.map(str::to_owned);
            let config = ExternalConfig { url: url.to_owned(), user, ..ExternalConfig::default() };
            let error = options(&config, "c").expect_err(url).to_string();
            assert!(error.contains(why), "{url}: {error}");
        }
        let config = ExternalConfig { url: "mqtt://h:1884".to_owned(), ..ExternalConfig::default() };
        assert_eq!(options(&config, "c").expect("fine").broker_address(), ("h".to_owned(), 1884));
    }
}
