//! The shape that all admin requests share: options, a queue for the answers, events that own results.

use crate::Error;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka_sys as sys;
use std::ffi::{CStr, CString, c_char};
use std::marker::PhantomData;
use std::ptr;
use std::time::Duration;

/// Options of one request; they live no longer than their client.
pub struct Options<'c> {
    raw: *mut sys::rd_kafka_AdminOptions_t,
    client: PhantomData<&'c ()>,
}

impl<'c> Options<'c> {
    /// Makes options with a time-out, clamped to librdkafka's 1 s to 1 h.
    pub fn new<C: ClientContext>(
        client: &'c Client<C>,
        op: sys::rd_kafka_admin_op_t,
        timeout: Duration,
    ) -> Self {
        let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).clamp(1_000, 3_600_000);
        #[expect(unsafe_code, reason = "admin options of requests that rdkafka does not expose")]
        // SAFETY: the client is valid; the error buffer is optional.
        unsafe {
            let raw = sys::rd_kafka_AdminOptions_new(client.native_ptr(), op);
            let refused = sys::rd_kafka_AdminOptions_set_request_timeout(raw, ms, ptr::null_mut(), 0);
            debug_assert!(code_of(refused).is_none(), "the time-out is within librdkafka's bounds");
            Self { raw, client: PhantomData }
        }
    }

    /// Returns the options for a call.
    pub fn ptr(&self) -> *mut sys::rd_kafka_AdminOptions_t {
        self.raw
    }
}

impl Drop for Options<'_> {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "frees what `new` made")]
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            sys::rd_kafka_AdminOptions_destroy(self.raw);
        }
    }
}

/// A queue for answers; it lives no longer than its client.
pub struct Queue<'c> {
    raw: *mut sys::rd_kafka_queue_t,
    client: PhantomData<&'c ()>,
}

impl<'c> Queue<'c> {
    /// Makes an empty queue.
    pub fn new<C: ClientContext>(client: &'c Client<C>) -> Self {
        #[expect(unsafe_code, reason = "a queue for answers of requests that rdkafka does not expose")]
        // SAFETY: the client is valid.
        let raw = unsafe { sys::rd_kafka_queue_new(client.native_ptr()) };
        Self { raw, client: PhantomData }
    }

    /// Returns the queue for a call.
    pub fn ptr(&self) -> *mut sys::rd_kafka_queue_t {
        self.raw
    }

    /// Waits for the next answer. librdkafka answers within its own time-out; a second more is granted.
    pub fn wait(&self, timeout: Duration) -> Result<Event, Error> {
        let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX - 1_000).max(1_000) + 1_000;
        #[expect(unsafe_code, reason = "takes an answer; the event is owned by the wrapper")]
        // SAFETY: the queue is valid; a null event means that nothing came.
        unsafe {
            let raw = sys::rd_kafka_queue_poll(self.raw, ms);
            if raw.is_null() {
                let message = format!("no answer within {ms} ms");
                return Err(Error { code: RDKafkaErrorCode::OperationTimedOut, message });
            }
            let event = Event(raw);
            match code_of(sys::rd_kafka_event_error(raw)) {
                None => Ok(event),
                Some(code) => Err(Error { code, message: text(sys::rd_kafka_event_error_string(raw)) }),
            }
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "frees what `new` made")]
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            sys::rd_kafka_queue_destroy(self.raw);
        }
    }
}

/// An answer, which owns the result in it.
pub struct Event(*mut sys::rd_kafka_event_t);

impl Event {
    /// Returns the event for a call.
    pub fn ptr(&self) -> *mut sys::rd_kafka_event_t {
        self.0
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "frees the answer and the result in it")]
        // SAFETY: taken from the queue, destroyed once.
        unsafe {
            sys::rd_kafka_event_destroy(self.0);
        }
    }
}

/// Makes a C string of a name.
pub fn c_string(name: &str) -> Result<CString, Error> {
    CString::new(name).map_err(|_| Error {
        code: RDKafkaErrorCode::InvalidArgument,
        message: format!("`{}` has a NUL in it", name.escape_default()),
    })
}

/// Returns the code, or `None` where there is no error.
pub fn code_of(raw: sys::rd_kafka_resp_err_t) -> Option<RDKafkaErrorCode> {
    (raw != sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR).then(|| raw.into())
}

#[expect(unsafe_code, reason = "reads librdkafka's error object")]
/// # Safety
/// `error` is null or a valid error.
pub unsafe fn error_of(error: *const sys::rd_kafka_error_t) -> Option<Error> {
    if error.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe {
        let code = code_of(sys::rd_kafka_error_code(error))?;
        Some(Error { code, message: text(sys::rd_kafka_error_string(error)) })
    }
}

#[expect(unsafe_code, reason = "reads librdkafka's arrays of pointers")]
/// # Safety
/// `array` is null or has `count` pointers.
pub unsafe fn items<T>(array: *mut *const T, count: usize) -> impl Iterator<Item = *const T> {
    let count = if array.is_null() { 0 } else { count };
    // SAFETY: the index stays below `count`.
    (0..count).map(move |i| unsafe { *array.add(i) })
}

#[expect(unsafe_code, reason = "copies librdkafka's strings")]
/// Copies a string, empty where it is null; bytes that are not UTF-8 are replaced.
///
/// # Safety
/// `raw` is null or a string that ends with NUL.
pub unsafe fn text(raw: *const c_char) -> String {
    if raw.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}
