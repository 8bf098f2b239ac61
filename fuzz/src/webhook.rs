//! What a webhook answers.

use throughline_platform::webhook::judge;
use throughline_runtime::ports::Answer;

/// Two bytes with the status, a line with `Retry-After` (empty: none), the text. Whose fault it is follows from
/// the status alone.
pub fn webhook_answers(data: &[u8]) {
    let [high, low, rest @ ..] = data else { return };
    let status = u16::from_be_bytes([*high, *low]);
    let (pause, text) = super::parted(rest, b'\n');
    let text = String::from_utf8_lossy(text);
    let message = match judge(status, Some(pause).filter(|pause| !pause.is_empty()), &text) {
        Answer::Delivered => return assert!((200..300).contains(&status), "{status}"),
        Answer::Refused { code, message } => {
            assert!((400..500).contains(&status), "{status} refuses a message");
            assert_eq!(code, format!("http_{status}"));
            message
        }
        Answer::Failed { message, wait } => {
            let number = std::str::from_utf8(pause).ok().and_then(|pause| pause.trim().parse().ok());
            assert_eq!(wait.map(|wait| wait.as_secs()), number);
            message
        }
        Answer::Unavailable { message } => message,
    };
    assert!(message.contains(&status.to_string()) && !message.contains(char::is_control), "{message:?}");
    assert!(message.len() <= text.len() + 128, "{} bytes of {}", message.len(), text.len());
}
