//! Gives librdkafka's questions to a coordinator the end that they lack: `rd_kafka_coord_req` of 2.12.1 stores
//! a time-out that nobody reads, and a question waits for as long as no coordinator is found or reached.
//!
//! Three things came of it:
//!
//! - An admin request about a group timed out and was freed; when the coordinator came at last, its answer
//!   was looked up once more in the freed memory: `Assertion failed: eonce->refcnt > 0` ended the process
//!   (librdkafka's issues 3663 and 4605, its pull request 5397).
//! - `rd_kafka_send_offsets_to_transaction` did not come back, whatever its time-out (5456, 5511, its pull
//!   request 5457).
//! - A coordinator that metadata once left out, as it does with a broker that is down, was waited for although
//!   its handle is given up for good: the cache of coordinators keeps the handle, and drops it only where
//!   nobody asks for five minutes.
//!
//! The linker puts [`__wrap_rd_kafka_coord_req`] in the place of librdkafka's function (`--wrap`, in
//! `.cargo/config.toml`). It hands on functions of its own for sending and for the answer, which know the
//! [`Question`]. librdkafka's timer of one second passes `rd_kafka_coord_cache_expire`: there the cache is
//! emptied while a question waits, so that the coordinator is asked for anew, and questions of a transaction
//! that are over their time end with `_TIMED_OUT`, which the transaction's code repeats until its own time-out
//! is over. All of it runs on the client's main thread.

use rdkafka_sys::rd_kafka_resp_err_t as Known;
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::time::{Duration, Instant};

/// Where librdkafka puts an answer: `rd_kafka_replyq_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ReplyQueue {
    queue: *mut c_void,
    version: i32,
}

/// `rd_kafka_resp_err_t`, which a broker may extend: no Rust enumeration.
type Code = c_int;

const NO_ERROR: Code = Known::RD_KAFKA_RESP_ERR_NO_ERROR as Code;
const DESTROY: Code = Known::RD_KAFKA_RESP_ERR__DESTROY as Code;
const TIMED_OUT: Code = Known::RD_KAFKA_RESP_ERR__TIMED_OUT as Code;

/// `rd_kafka_send_req_cb_t`: broker, operation, queue for the answer, function for the answer, its argument.
type Send = unsafe extern "C" fn(*mut c_void, *mut c_void, ReplyQueue, Answer, *mut c_void) -> Code;
/// `rd_kafka_resp_cb_t`: client, broker, error, answer, request, the argument.
type Answer = unsafe extern "C" fn(*mut c_void, *mut c_void, Code, *mut c_void, *mut c_void, *mut c_void);

/// How long a question may wait for the coordinator that the cache names.
const PATIENCE: Duration = Duration::from_secs(2);

/// A question that was not sent yet.
struct Question {
    since: Instant,
    client: *mut c_void,
    send: Send,
    answer: Answer,
    argument: *mut c_void,
    /// When it ends unsent; `None` for admin requests, which have a timer of their own.
    end: Option<Instant>,
    /// Whether the asker is told already, or is gone.
    over: bool,
}

thread_local! {
    /// The unsent questions of this thread's client.
    static WAITING: RefCell<Vec<*mut Question>> = const { RefCell::new(Vec::new()) };
}

#[expect(unsafe_code, reason = "librdkafka's functions, under the names that the linker's --wrap gives them")]
unsafe extern "C" {
    fn __real_rd_kafka_coord_req(
        client: *mut c_void,
        kind: c_int,
        key: *const c_char,
        send: Send,
        operation: *mut c_void,
        delay_ms: c_int,
        timeout_ms: c_int,
        queue: ReplyQueue,
        answer: Answer,
        argument: *mut c_void,
    );
    fn __real_rd_kafka_coord_cache_expire(cache: *mut c_void);
    /// Empties the cache, which can be used on.
    fn rd_kafka_coord_cache_destroy(cache: *mut c_void);
}

#[expect(unsafe_code, reason = "librdkafka calls it in place of its own")]
// SAFETY: the linker gives the name its meaning; nothing else defines it.
#[unsafe(no_mangle)]
unsafe extern "C" fn __wrap_rd_kafka_coord_req(
    client: *mut c_void,
    kind: c_int,
    key: *const c_char,
    send: Send,
    operation: *mut c_void,
    delay_ms: c_int,
    timeout_ms: c_int,
    queue: ReplyQueue,
    answer: Answer,
    argument: *mut c_void,
) {
    // Only the transaction's questions carry an operation; see `rdkafka_txnmgr.c` and `rdkafka_admin.c`.
    let since = Instant::now() + milliseconds(delay_ms);
    let end = (!operation.is_null()).then(|| since + milliseconds(timeout_ms));
    let question = Question { since, client, send, answer, argument, end, over: false };
    let question = Box::into_raw(Box::new(question));
    WAITING.with_borrow_mut(|waiting| waiting.push(question));
    // SAFETY: the arguments are the caller's, but for two functions that know the question as their argument.
    // librdkafka calls `sending` until it sends or fails, and `answering` once if nothing was sent.
    unsafe {
        __real_rd_kafka_coord_req(
            client,
            kind,
            key,
            sending,
            operation,
            delay_ms,
            timeout_ms,
            queue,
            answering,
            question.cast(),
        );
    }
}

fn milliseconds(given: c_int) -> Duration {
    Duration::from_millis(u64::try_from(given).unwrap_or_default())
}

#[expect(unsafe_code, reason = "librdkafka calls it when the coordinator is there")]
unsafe extern "C" fn sending(
    broker: *mut c_void,
    operation: *mut c_void,
    queue: ReplyQueue,
    _: Answer,
    argument: *mut c_void,
) -> Code {
    let question: *mut Question = argument.cast();
    // SAFETY: the question lives until it is sent, here, or answered unsent, below; both on this thread.
    unsafe {
        if (*question).over {
            // The operation is freed. What comes of this code is an answer that nobody waits for.
            return DESTROY;
        }
        let code = ((*question).send)(broker, operation, queue, (*question).answer, (*question).argument);
        match code {
            NO_ERROR => forget(question),
            // The admin request is over and its memory was given back with this call.
            DESTROY => (*question).over = true,
            _ => {}
        }
        code
    }
}

#[expect(unsafe_code, reason = "librdkafka calls it where a question could not be sent")]
unsafe extern "C" fn answering(
    client: *mut c_void,
    broker: *mut c_void,
    code: Code,
    answer: *mut c_void,
    request: *mut c_void,
    argument: *mut c_void,
) {
    let question: *mut Question = argument.cast();
    // SAFETY: as above; an answer comes once, and nothing uses the question after it.
    unsafe {
        if !(*question).over {
            ((*question).answer)(client, broker, code, answer, request, (*question).argument);
        }
        forget(question);
    }
}

#[expect(unsafe_code, reason = "frees what the wrap made")]
/// # Safety
/// `question` comes from the wrap, on this thread, and is not used again.
unsafe fn forget(question: *mut Question) {
    WAITING.with_borrow_mut(|waiting| waiting.retain(|other| *other != question));
    // SAFETY: the caller vouches for it.
    drop(unsafe { Box::from_raw(question) });
}

fn waiting_which(is: impl Fn(&Question) -> bool) -> Option<*mut Question> {
    WAITING.with_borrow(|waiting| {
        waiting.iter().copied().find(|question| {
            #[expect(unsafe_code, reason = "reads what the wrap made")]
            // SAFETY: a question in the list lives; it leaves the list before it is freed.
            let question = unsafe { &**question };
            is(question)
        })
    })
}

/// Stands for the request that a question over its time never had: of it, the answer's function reads when it
/// was sent (0: never). It is larger than `rd_kafka_buf_t` (about 500 bytes).
static NO_REQUEST: [u64; 1_024] = [0; 1_024];

#[expect(unsafe_code, reason = "librdkafka calls it each second in place of its own")]
// SAFETY: the linker gives the name its meaning; nothing else defines it.
#[unsafe(no_mangle)]
unsafe extern "C" fn __wrap_rd_kafka_coord_cache_expire(cache: *mut c_void) {
    let now = Instant::now();
    let kept_waiting = waiting_which(|question| question.since + PATIENCE <= now).is_some();
    // SAFETY: this is the caller's argument, and the thread that alone uses the cache.
    unsafe {
        if kept_waiting {
            rd_kafka_coord_cache_destroy(cache);
        } else {
            __real_rd_kafka_coord_cache_expire(cache);
        }
    }
    // One at a time: what the answer's function does may add a question.
    loop {
        let over = waiting_which(|question| !question.over && question.end.is_some_and(|end| end <= now));
        let Some(question) = over else { return };
        // SAFETY: the question lives until librdkafka has called `answering`; this is its client's thread, and
        // the function takes a request that is only read, no broker and no answer with an error.
        unsafe {
            (*question).over = true;
            let request = (&raw const NO_REQUEST).cast_mut().cast();
            ((*question).answer)(
                (*question).client,
                ptr::null_mut(),
                TIMED_OUT,
                ptr::null_mut(),
                request,
                (*question).argument,
            );
        }
    }
}

/// See [`crate::guard::require`].
pub(crate) fn require() {
    std::hint::black_box(__real_rd_kafka_coord_req as *const ());
    std::hint::black_box(__real_rd_kafka_coord_cache_expire as *const ());
}
