//! The webhook of `notify`: posts deliveries from a few threads, and sorts what comes back by whose fault it is.
//!
//! | the receiver | means |
//! |---|---|
//! | answers 2xx | delivered |
//! | answers 408, 425 or 5xx, breaks off, or does not answer in time | failed: whether others pass tells whose fault it is |
//! | refuses the connection, has no address, answers 1xx, 3xx, 401, 403, 404, 405, 407, 410 or 429 | unavailable: address, login, receiver or pace are wrong, not the message |
//! | answers any other 4xx | refused |

use crate::failure::CliError;
use parking_lot::Mutex;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;
use throughline_model::stage::Delivery;
use throughline_runtime::ports::{Answer, Effector};
use ureq::Agent;

/// How many deliveries are posted at once: the partitions of an input go one by one, and more than this would be
/// a burst that few receivers like.
const WORKERS: usize = 8;
/// A receiver that does not take a connection for this long is away.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// How much of a refusal's text a dead letter repeats.
const TEXT_BYTES_MAX: u64 = 512;

/// The port to one webhook.
pub struct Webhook {
    jobs: Sender<(u64, Delivery)>,
    answers: Receiver<(u64, Answer)>,
}

impl Webhook {
    /// Starts the threads that post to `url`; they end when the port is dropped and what is under way is
    /// answered.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(url: &str, timeout: Duration) -> Result<Self, CliError> {
        let (jobs, waiting) = channel();
        let (tell, answers) = channel();
        let waiting = Arc::new(Mutex::new(waiting));
        let agent = Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_connect(Some(timeout.min(CONNECT_WITHIN)))
            .http_status_as_error(false)
            .max_redirects(0)
            .build()
            .new_agent();
        for number in 0..WORKERS {
            let (agent, url, waiting, tell) =
                (agent.clone(), url.to_owned(), Arc::clone(&waiting), Sender::clone(&tell));
            let builder = std::thread::Builder::new().name(format!("webhook-{number}"));
            builder.spawn(move || post_all(&agent, &url, &waiting, &tell))?;
        }
        Ok(Self { jobs, answers })
    }
}

impl Effector for Webhook {
    fn dependency(&self) -> &'static str {
        "webhook"
    }

    fn begin(&mut self, token: u64, delivery: &Delivery) {
        self.jobs.send((token, delivery.clone())).expect("the threads live as long as the port");
    }

    fn answer(&mut self, wait: Duration) -> Option<(u64, Answer)> {
        match self.answers.recv_timeout(wait) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the threads live as long as the port"),
        }
    }
}

fn post_all(
    agent: &Agent,
    url: &str,
    waiting: &Mutex<Receiver<(u64, Delivery)>>,
    tell: &Sender<(u64, Answer)>,
) {
    loop {
        let job = waiting.lock().recv();
        let Ok((token, delivery)) = job else { return };
        if tell.send((token, post(agent, url, &delivery))).is_err() {
            return;
        }
    }
}

fn post(agent: &Agent, url: &str, delivery: &Delivery) -> Answer {
    let mut request =
        agent.post(url).header("Content-Type", "application/json").header("Idempotency-Key", &delivery.id);
    if let Some(traceparent) = &delivery.traceparent {
        request = request.header("traceparent", traceparent);
    }
    match request.send(&delivery.body[..]) {
        Ok(mut response) => {
            let text = response.body_mut().with_config().limit(TEXT_BYTES_MAX).read_to_string();
            let pause = response.headers().get("retry-after").map(ureq::http::HeaderValue::as_bytes);
            // A text that is long, or not UTF-8, changes nothing about the answer.
            judge(response.status().as_u16(), pause, &text.unwrap_or_default())
        }
        Err(error) => failed(&error),
    }
}

/// Sorts an answer: its status, its header `Retry-After` and its text. A pause that is no number of seconds, a
/// date for instance, is none.
pub fn judge(status: u16, retry_after: Option<&[u8]>, text: &str) -> Answer {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let message = format!("it answers {status} {}", text.trim()).trim_end().to_owned();
    match status {
        200..300 => Answer::Delivered,
        // It is asked too much, which says nothing about the message, although others pass meanwhile.
        429 => Answer::Unavailable { message },
        408 | 425 | 500.. => {
            let seconds = retry_after.and_then(|v| std::str::from_utf8(v).ok()?.trim().parse().ok());
            Answer::Failed { message, wait: seconds.map(Duration::from_secs) }
        }
        401 | 403 | 404 | 405 | 407 | 410 | 0..400 => {
            let message = format!("{message}; `notify.webhook_url` or what lies behind it is wrong");
            Answer::Unavailable { message }
        }
        400..500 => Answer::Refused { code: format!("http_{status}"), message },
    }
}

/// Sorts an attempt without an answer. An error's text names neither path nor query, which may hold a secret.
fn failed(error: &ureq::Error) -> Answer {
    let message = error.to_string();
    match error {
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_) => Answer::Unavailable { message },
        ureq::Error::BadUri(_) => {
            Answer::Unavailable { message: "`notify.webhook_url` is no address".to_owned() }
        }
        ureq::Error::Io(e) if !broke_off(e.kind()) => Answer::Unavailable { message },
        _ => Answer::Failed { message, wait: None },
    }
}

/// Says whether a connection that existed ended: a message may be what the receiver dies of.
fn broke_off(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::TimedOut
            | ErrorKind::WouldBlock
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn what_a_receiver_answers_says_whose_fault_it_is() {
        let kind = |answer: &Answer| match answer {
            Answer::Delivered => "delivered",
            Answer::Refused { .. } => "refused",
            Answer::Failed { .. } => "failed",
            Answer::Unavailable { .. } => "unavailable",
        };
        for (code, expected) in [
            (101, "unavailable"),
            (200, "delivered"),
            (202, "delivered"),
            (204, "delivered"),
            (302, "unavailable"),
            (400, "refused"),
            (401, "unavailable"),
            (404, "unavailable"),
            (408, "failed"),
            (410, "unavailable"),
            (413, "refused"),
            (422, "refused"),
            (429, "unavailable"),
            (500, "failed"),
            (503, "failed"),
        ] {
            let answer = judge(code, None, "so\nit is ");
            assert_eq!(kind(&answer), expected, "{code}: {answer:?}");
        }
        let busy = |wait| Answer::Failed { message: "it answers 503".into(), wait };
        assert_eq!(judge(503, Some(b" 7 "), ""), busy(Some(Duration::from_secs(7))));
        for no_number in [&b"Wed, 21 Oct 2026 07:28:00 GMT"[..], b"-1", b"7.5", b"", b"\xff"] {
            assert_eq!(judge(503, Some(no_number), ""), busy(None));
        }
    }

    /// Listens, takes one request, and lets `serve` do the rest with the connection and what came.
    fn take_one<T: Send + 'static>(
        serve: impl FnOnce(TcpStream, Vec<u8>) -> T + Send + 'static,
    ) -> (String, std::thread::JoinHandle<T>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/hook?secret=s3cret", listener.local_addr().expect("bound"));
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the webhook connects");
            let (mut got, mut buffer) = (Vec::new(), [0; 4_096]);
            while !got.ends_with(b"{}") {
                let n = stream.read(&mut buffer).expect("it sends");
                got.extend_from_slice(&buffer[..n]);
            }
            serve(stream, got)
        });
        (url, served)
    }

    /// Serves one connection with `answer` and returns what came in.
    fn receiver(answer: Option<&'static str>) -> (String, std::thread::JoinHandle<String>) {
        take_one(move |mut stream, got| {
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).expect("it reads"),
                // Until the client gives up.
                None => drop(stream.read(&mut [0])),
            }
            String::from_utf8(got).expect("a request is text")
        })
    }

    fn posted(url: &str, timeout_ms: u64) -> Answer {
        let mut webhook = Webhook::start(url, Duration::from_millis(timeout_ms)).expect("threads");
        let delivery = Delivery {
            id: "id-1".into(),
            traceparent: Some("00-a-b-01".into()),
            body: b"{}".to_vec(),
            expires_at: None,
        };
        webhook.begin(4, &delivery);
        let (token, answer) = webhook.answer(Duration::from_secs(30)).expect("an answer");
        assert_eq!(token, 4);
        answer
    }

    #[test]
    fn a_delivery_is_posted_with_its_id_and_trace() {
        let (url, serve) = receiver(Some("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"));
        assert_eq!(posted(&url, 10_000), Answer::Delivered);
        let got = serve.join().expect("it ends").to_ascii_lowercase();
        for line in [
            "post /hook?secret=s3cret http/1.1",
            "content-type: application/json",
            "idempotency-key: id-1",
            "traceparent: 00-a-b-01",
        ] {
            assert!(got.contains(line), "{line}: {got}");
        }
    }

    #[test]
    fn eight_deliveries_are_posted_at_once_and_the_others_wait() {
        const ALL: usize = 12;
        let soon = Duration::from_secs(30);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("bound"));
        let (tell, come) = channel();
        let serve = std::thread::spawn(move || {
            for _ in 0..ALL {
                let (mut stream, _) = listener.accept().expect("the webhook connects");
                let (mut got, mut buffer) = (Vec::new(), [0; 4_096]);
                while !got.ends_with(b"{}") {
                    let n = stream.read(&mut buffer).expect("it sends");
                    got.extend_from_slice(&buffer[..n]);
                }
                tell.send(stream).expect("the test listens");
            }
        });
        let mut webhook = Webhook::start(&url, Duration::from_secs(60)).expect("threads");
        for token in 0..ALL as u64 {
            webhook.begin(token, &Delivery { body: b"{}".to_vec(), ..Delivery::default() });
        }
        let mut held: Vec<_> = (0..8).map(|_| come.recv_timeout(soon).expect("eight at once")).collect();
        // Longer only makes it surer.
        assert!(come.recv_timeout(Duration::from_millis(500)).is_err(), "the ninth waits for an answer");
        let mut left = ALL - held.len();
        while let Some(mut stream) = held.pop() {
            let answered = stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
            answered.expect("it reads");
            drop(stream);
            let (_, answer) = webhook.answer(soon).expect("an answer");
            assert_eq!(answer, Answer::Delivered);
            if left > 0 {
                held.push(come.recv_timeout(soon).expect("each answer lets one more be posted"));
                left -= 1;
            }
        }
        serve.join().expect("all came");
    }

    #[test]
    fn silence_is_a_failure_and_a_closed_port_is_no_receiver() {
        let (url, serve) = receiver(None);
        let silent = posted(&url, 100);
        assert!(matches!(silent, Answer::Failed { .. }), "{silent:?}");
        serve.join().expect("it ends");
        let (url, serve) = receiver(Some(""));
        let broken = posted(&url, 10_000);
        assert!(matches!(broken, Answer::Failed { .. }), "{broken:?}");
        serve.join().expect("it ends");
        // The listener is gone.
        let Answer::Unavailable { message } = posted(&url, 10_000) else { panic!("nobody listens") };
        assert!(!message.contains("s3cret"), "{message}");
    }

    #[test]
    fn a_receiver_that_takes_no_connection_is_away_long_before_the_delivery_times_out() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        let listener = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            socket.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
            socket.listen(1).expect("listens")
        });
        let address = listener.local_addr().expect("bound");
        // Nobody accepts; once the queue is full the system lets connections wait.
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(500)) {
            queued.push(stream);
            assert!(queued.len() < 100, "the queue does not fill");
        }
        // The answer comes within half a minute and the whole delivery has two: the connection was given up.
        let answer = posted(&format!("http://{address}/"), 120_000);
        assert!(matches!(answer, Answer::Unavailable { .. }), "{answer:?}");
    }

    /// Takes one request and answers with these bytes, whatever they are, then closes the connection.
    fn answers(bytes: Vec<u8>) -> (String, std::thread::JoinHandle<()>) {
        take_one(move |mut stream, _| {
            // Who has heard enough closes the connection.
            drop(stream.write_all(&bytes));
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn an_answer_of_any_bytes_is_judged(
            status in prop_oneof!["[0-9]{1,4}", "(200|204|304|408|422|429|503) [ -~]{0,9}", "\\PC{0,4}"],
            headers in prop::collection::vec(prop_oneof![
                "(Retry-After|Content-Length|Transfer-Encoding|Location|Connection): [ -~]{0,12}",
                "Retry-After: [0-9]{1,25}",
                "Content-Length: [0-9]{1,4}",
                Just("Transfer-Encoding: chunked".to_owned()),
                "[ -~]{0,20}",
            ], 0..4),
            body in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..2_000),
                "[0-9a-f]{1,17}\r\n[a-z]{0,20}\r\n0\r\n\r\n".prop_map(String::into_bytes),
            ],
            cut in any::<prop::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut bytes = format!("HTTP/1.1 {status}\r\n{}\r\n\r\n", headers.join("\r\n")).into_bytes();
            bytes.extend_from_slice(&body);
            if is_cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let begins_well = bytes.starts_with(b"HTTP/1.1 2");
            let (url, serve) = answers(bytes);
            let answer = posted(&url, 5_000);
            serve.join().expect("it ends");
            match answer {
                Answer::Delivered => prop_assert!(begins_well, "{status}"),
                Answer::Refused { message, .. } | Answer::Failed { message, .. } | Answer::Unavailable { message } => {
                    prop_assert!(message.len() <= TEXT_BYTES_MAX as usize + 256, "{message}");
                    prop_assert!(!message.contains("s3cret"), "{message}");
                }
            }
        }
    }
}
