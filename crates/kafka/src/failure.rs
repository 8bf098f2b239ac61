//! What librdkafka says, by what to do about it.

use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use throughline_runtime::ports::Failure;

/// The client configuration is refused.
pub(crate) const BAD_CONFIG: &str = "TL-KAFKA-001";
/// The cluster refuses this client: authentication, authorisation, version.
pub(crate) const NOT_ALLOWED: &str = "TL-KAFKA-002";
/// A record is larger than the topic takes.
pub(crate) const TOO_LARGE: &str = "TL-KAFKA-003";

/// Kafka is down, slow, or not yet what it shall be.
pub(crate) fn dependency(message: impl Into<String>) -> Failure {
    Failure::Dependency { dependency: "kafka", message: message.into() }
}

/// The configuration itself is wrong.
pub(crate) fn refused_config(error: &KafkaError) -> Failure {
    let message = match error {
        KafkaError::ClientConfig(_, why, key, value) => {
            format!("the Kafka client refuses `{key} = {value}`: {}", why.trim_end_matches('.'))
        }
        other => format!("the Kafka client cannot be made: {other}"),
    };
    Failure::Stop { code: BAD_CONFIG, message }
}

/// Sorts an error of an ordinary call; `what` says what was tried.
pub(crate) fn failure(what: &str, error: &KafkaError) -> Failure {
    match error.rdkafka_error_code() {
        Some(code) => by_code(what, code, &error.to_string()),
        None => dependency(format!("{what}: {error}")),
    }
}

/// Sorts an error of an admin request.
pub(crate) fn ffi_failure(what: &str, error: &throughline_kafka_ffi::Error) -> Failure {
    by_code(what, error.code, &error.message)
}

/// Sorts an error by its code.
pub(crate) fn by_code(what: &str, code: Code, message: &str) -> Failure {
    let message = format!("{what}: {message}");
    if is_fence(code) {
        return Failure::Fenced(message);
    }
    match code {
        Code::SaslAuthenticationFailed
        | Code::Authentication
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::SecurityDisabled
        | Code::UnsupportedVersion
        | Code::UnsupportedFeature
        | Code::UnsupportedSASLMechanism => Failure::Stop { code: NOT_ALLOWED, message },
        Code::InvalidConfig | Code::InvalidArgument | Code::InvalidTransactionTimeout => {
            Failure::Stop { code: BAD_CONFIG, message }
        }
        Code::MessageSizeTooLarge | Code::InvalidMessageSize => Failure::Stop { code: TOO_LARGE, message },
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
            dependency(format!("{message}; `throughline topics apply` makes missing topics"))
        }
        _ => dependency(message),
    }
}

/// Says whether another writer or member took over.
pub(crate) fn is_fence(code: Code) -> bool {
    matches!(
        code,
        Code::Fenced
            | Code::ProducerFenced
            | Code::InvalidProducerEpoch
            | Code::FencedInstanceId
            | Code::IllegalGeneration
            | Code::UnknownMemberId
            | Code::StaleMemberEpoch
            | Code::FencedMemberEpoch
            | Code::InvalidTransactionalState
            | Code::UnknownProducerId
            | Code::InvalidProducerIdMapping
    )
}
