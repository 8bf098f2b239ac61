//! The calls of librdkafka 2.12 that rdkafka 0.39 does not expose: topic ids, groups with their committed
//! offsets and metadata, offsets of many partitions in one request, and IncrementalAlterConfigs.
//!
//! Every function takes a client that rdkafka made, sends admin requests, and waits for the answers at most
//! for the time-out given. Nothing of librdkafka's memory leaves this crate: results are copied out before
//! the event that owns them is destroyed.

mod coordinator;
pub mod guard;
mod request;

use rdkafka::client::{Client, ClientContext};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::BorrowedMessage;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka_sys as sys;
use request::{Options, Queue, c_string, code_of, error_of, items, text};
use std::ffi::CStr;
use std::ptr;
use std::time::Duration;

/// What librdkafka or the broker answered instead of a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The error's code; retry decisions branch on it.
    pub code: RDKafkaErrorCode,
    /// What was said, without a final full stop.
    pub message: String,
}

/// A result for each name asked for.
pub type Named<T> = Vec<(String, Result<T, Error>)>;

/// One entry of a list of partitions, its metadata as raw bytes.
///
/// rdkafka's own accessor panics on metadata that is not UTF-8, and a foreign tool may write anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The topic's name.
    pub topic: String,
    /// The partition's number.
    pub partition: i32,
    /// The offset; negative values are librdkafka's logical offsets.
    pub offset: i64,
    /// The commit metadata, empty where there is none.
    pub metadata: Vec<u8>,
    /// The error of this partition.
    pub error: Option<RDKafkaErrorCode>,
}

/// A group as the cluster lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupListing {
    /// The group's id.
    pub group: String,
    /// `Stable`, `Empty`, `Dead` …, as Kafka spells it.
    pub state: String,
}

/// A group with its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupDescription {
    /// The group's id.
    pub group: String,
    /// `Stable`, `Empty`, `Reconciling` …, as Kafka spells it.
    pub state: String,
    /// The assignor's name, empty where unknown.
    pub assignor: String,
    /// The members.
    pub members: Vec<Member>,
    /// Why the group could not be described.
    pub error: Option<Error>,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The id that the coordinator knows the member by.
    pub member_id: String,
    /// The client id that the member chose.
    pub client_id: String,
    /// The host it connects from.
    pub host: String,
    /// The partitions assigned to it.
    pub partitions: Vec<(String, i32)>,
}

/// Which offset [`list_offsets`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffsetSpec {
    /// The first offset that still exists.
    Earliest,
    /// The end: the high watermark, or the last stable offset under read_committed.
    Latest,
    /// The first record whose time is not before this, in milliseconds since the epoch.
    AtOrAfter(i64),
}

/// Returns the ids of topics in base64 as Kafka's tools print them; a topic that was deleted and made again
/// has another id. An unknown topic has an error in its place.
///
/// # Errors
/// The request failed as a whole.
pub fn topic_ids<C: ClientContext>(
    client: &Client<C>,
    topics: &[&str],
    timeout: Duration,
) -> Result<Named<String>, Error> {
    if topics.is_empty() {
        return Ok(Vec::new());
    }
    let names = topics.iter().map(|t| c_string(t)).collect::<Result<Vec<_>, _>>()?;
    let mut pointers: Vec<_> = names.iter().map(|n| n.as_ptr()).collect();
    let queue = Queue::new(client);
    let options = Options::new(client, sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS, timeout);
    #[expect(unsafe_code, reason = "DescribeTopics is not exposed by rdkafka")]
    // SAFETY: the names outlive the call, librdkafka copies them; the collection is destroyed once.
    unsafe {
        let collection = sys::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
        sys::rd_kafka_DescribeTopics(client.native_ptr(), collection, options.ptr(), queue.ptr());
        sys::rd_kafka_TopicCollection_destroy(collection);
    }
    let event = queue.wait(timeout)?;
    #[expect(unsafe_code, reason = "reads the result of DescribeTopics")]
    // SAFETY: the result and what it points to live as long as `event`.
    unsafe {
        let mut count = 0;
        let result = sys::rd_kafka_event_DescribeTopics_result(event.ptr());
        let topics = sys::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        let describe = |topic: *const sys::rd_kafka_TopicDescription_t| {
            let name = text(sys::rd_kafka_TopicDescription_name(topic));
            let id = match error_of(sys::rd_kafka_TopicDescription_error(topic)) {
                Some(error) => Err(error),
                None => {
                    Ok(text(sys::rd_kafka_Uuid_base64str(sys::rd_kafka_TopicDescription_topic_id(topic))))
                }
            };
            (name, id)
        };
        Ok(items(topics, count).map(describe).collect())
    }
}

/// Returns every group of the cluster, also those without members.
///
/// # Errors
/// The request failed, or a broker did not answer: then some groups would be missing unnoticed.
pub fn list_groups<C: ClientContext>(
    client: &Client<C>,
    timeout: Duration,
) -> Result<Vec<GroupListing>, Error> {
    let queue = Queue::new(client);
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTCONSUMERGROUPS;
    let options = Options::new(client, op, timeout);
    #[expect(unsafe_code, reason = "ListConsumerGroups is not exposed by rdkafka")]
    // SAFETY: all pointers are valid for the call.
    unsafe {
        sys::rd_kafka_ListConsumerGroups(client.native_ptr(), options.ptr(), queue.ptr());
    }
    let event = queue.wait(timeout)?;
    #[expect(unsafe_code, reason = "reads the result of ListConsumerGroups")]
    // SAFETY: the result and what it points to live as long as `event`.
    unsafe {
        let result = sys::rd_kafka_event_ListConsumerGroups_result(event.ptr());
        let mut count = 0;
        let errors = sys::rd_kafka_ListConsumerGroups_result_errors(result, &raw mut count);
        if let Some(error) = items(errors, count).find_map(|e| error_of(e)) {
            return Err(error);
        }
        let groups = sys::rd_kafka_ListConsumerGroups_result_valid(result, &raw mut count);
        let listing = |group: *const sys::rd_kafka_ConsumerGroupListing_t| GroupListing {
            group: text(sys::rd_kafka_ConsumerGroupListing_group_id(group)),
            state: state_name(sys::rd_kafka_ConsumerGroupListing_state(group)),
        };
        Ok(items(groups, count).map(listing).collect())
    }
}

/// Describes groups with their members, in one request a coordinator.
///
/// # Errors
/// The request failed as a whole; an error of one group is in its description.
pub fn describe_groups<C: ClientContext>(
    client: &Client<C>,
    groups: &[&str],
    timeout: Duration,
) -> Result<Vec<GroupDescription>, Error> {
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let names = groups.iter().map(|g| c_string(g)).collect::<Result<Vec<_>, _>>()?;
    let mut pointers: Vec<_> = names.iter().map(|n| n.as_ptr()).collect();
    let queue = Queue::new(client);
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONSUMERGROUPS;
    let options = Options::new(client, op, timeout);
    #[expect(unsafe_code, reason = "DescribeConsumerGroups is not exposed by rdkafka")]
    // SAFETY: the names outlive the call; librdkafka copies them.
    unsafe {
        let rk = client.native_ptr();
        sys::rd_kafka_DescribeConsumerGroups(
            rk,
            pointers.as_mut_ptr(),
            pointers.len(),
            options.ptr(),
            queue.ptr(),
        );
    }
    let event = queue.wait(timeout)?;
    #[expect(unsafe_code, reason = "reads the result of DescribeConsumerGroups")]
    // SAFETY: the result and what it points to live as long as `event`.
    unsafe {
        let result = sys::rd_kafka_event_DescribeConsumerGroups_result(event.ptr());
        let mut count = 0;
        let groups = sys::rd_kafka_DescribeConsumerGroups_result_groups(result, &raw mut count);
        Ok(items(groups, count).map(|g| describe_group(g)).collect())
    }
}

#[expect(unsafe_code, reason = "reads one group of DescribeConsumerGroups' result")]
/// # Safety
/// `group` is a valid description.
unsafe fn describe_group(group: *const sys::rd_kafka_ConsumerGroupDescription_t) -> GroupDescription {
    // SAFETY: the caller vouches for `group`; its parts live as long as it does.
    unsafe {
        let members = 0..sys::rd_kafka_ConsumerGroupDescription_member_count(group);
        let members = members.map(|i| {
            let member = sys::rd_kafka_ConsumerGroupDescription_member(group, i);
            let assignment = sys::rd_kafka_MemberDescription_assignment(member);
            let partitions = sys::rd_kafka_MemberAssignment_partitions(assignment);
            Member {
                member_id: text(sys::rd_kafka_MemberDescription_consumer_id(member)),
                client_id: text(sys::rd_kafka_MemberDescription_client_id(member)),
                host: text(sys::rd_kafka_MemberDescription_host(member)),
                partitions: entries_of(partitions).into_iter().map(|e| (e.topic, e.partition)).collect(),
            }
        });
        GroupDescription {
            group: text(sys::rd_kafka_ConsumerGroupDescription_group_id(group)),
            state: state_name(sys::rd_kafka_ConsumerGroupDescription_state(group)),
            assignor: text(sys::rd_kafka_ConsumerGroupDescription_partition_assignor(group)),
            members: members.collect(),
            error: error_of(sys::rd_kafka_ConsumerGroupDescription_error(group)),
        }
    }
}

/// Returns the committed offsets of groups with their metadata; the requests travel side by side.
/// Partitions without a commit are left out.
///
/// The client must be a consumer that names a group: librdkafka 2.12 passes `NOT_COORDINATOR`, which a broker
/// answers while it starts, on to the client's own group and ends the process where there is none.
///
/// # Errors
/// The client is no consumer, or a request failed as a whole; an error of one group is beside its name.
pub fn group_offsets<C: ClientContext>(
    client: &Client<C>,
    groups: &[&str],
    timeout: Duration,
) -> Result<Named<Vec<Entry>>, Error> {
    #[expect(unsafe_code, reason = "the type of a client is not exposed by rdkafka")]
    // SAFETY: the client lives as long as the borrow.
    let kind = unsafe { sys::rd_kafka_type(client.native_ptr()) };
    if kind != sys::rd_kafka_type_t::RD_KAFKA_CONSUMER {
        let message = "the offsets of groups can be asked for by a consumer only".to_owned();
        return Err(Error { code: RDKafkaErrorCode::InvalidArgument, message });
    }
    let queue = Queue::new(client);
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTCONSUMERGROUPOFFSETS;
    let options = Options::new(client, op, timeout);
    for group in groups {
        let name = c_string(group)?;
        #[expect(unsafe_code, reason = "ListConsumerGroupOffsets is not exposed by rdkafka")]
        // SAFETY: librdkafka copies the request, which is destroyed once; no list means all partitions.
        unsafe {
            let mut request = sys::rd_kafka_ListConsumerGroupOffsets_new(name.as_ptr(), ptr::null());
            let rk = client.native_ptr();
            sys::rd_kafka_ListConsumerGroupOffsets(rk, &raw mut request, 1, options.ptr(), queue.ptr());
            sys::rd_kafka_ListConsumerGroupOffsets_destroy(request);
        }
    }
    let mut found = Vec::with_capacity(groups.len());
    for _ in groups {
        let event = queue.wait(timeout)?;
        #[expect(unsafe_code, reason = "reads the result of ListConsumerGroupOffsets")]
        // SAFETY: the result and what it points to live as long as `event`.
        unsafe {
            let result = sys::rd_kafka_event_ListConsumerGroupOffsets_result(event.ptr());
            let mut count = 0;
            let groups = sys::rd_kafka_ListConsumerGroupOffsets_result_groups(result, &raw mut count);
            for group in items(groups, count) {
                let offsets = match error_of(sys::rd_kafka_group_result_error(group)) {
                    Some(error) => Err(error),
                    None => Ok(entries_of(sys::rd_kafka_group_result_partitions(group))),
                };
                let offsets = offsets.map(|list| list.into_iter().filter(|e| e.offset >= 0).collect());
                found.push((text(sys::rd_kafka_group_result_name(group)), offsets));
            }
        }
    }
    Ok(found)
}

/// Returns offsets of many partitions, in one request a broker. An [`OffsetSpec::AtOrAfter`] later than
/// every record gives −1.
///
/// # Errors
/// The request failed as a whole; an error of one partition is in its entry.
pub fn list_offsets<C: ClientContext>(
    client: &Client<C>,
    partitions: &[(&str, i32)],
    spec: OffsetSpec,
    committed_only: bool,
    timeout: Duration,
) -> Result<Vec<Entry>, Error> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let raw = match spec {
        OffsetSpec::Earliest => sys::rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_EARLIEST as i64,
        OffsetSpec::Latest => sys::rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_LATEST as i64,
        OffsetSpec::AtOrAfter(ms) => ms.max(0),
    };
    let list = TopicPartitionList::with_capacity(partitions.len());
    let queue = Queue::new(client);
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTOFFSETS;
    let options = Options::new(client, op, timeout);
    for (topic, partition) in partitions {
        let topic = c_string(topic)?;
        #[expect(
            unsafe_code,
            reason = "rdkafka's list cannot carry the offset specifications of ListOffsets"
        )]
        // SAFETY: the list is valid; the entry returned belongs to it and is written before the next call.
        unsafe {
            (*sys::rd_kafka_topic_partition_list_add(list.ptr(), topic.as_ptr(), *partition)).offset = raw;
        }
    }
    #[expect(unsafe_code, reason = "ListOffsets is not exposed by rdkafka")]
    // SAFETY: all pointers are valid for the call; librdkafka copies the list.
    unsafe {
        if committed_only {
            let level = sys::rd_kafka_IsolationLevel_t::RD_KAFKA_ISOLATION_LEVEL_READ_COMMITTED;
            let error = sys::rd_kafka_AdminOptions_set_isolation_level(options.ptr(), level);
            if !error.is_null() {
                let failed = error_of(error);
                sys::rd_kafka_error_destroy(error);
                return Err(failed.expect("a non-null error states itself"));
            }
        }
        sys::rd_kafka_ListOffsets(client.native_ptr(), list.ptr(), options.ptr(), queue.ptr());
    }
    let event = queue.wait(timeout)?;
    #[expect(unsafe_code, reason = "reads the result of ListOffsets")]
    // SAFETY: the result and what it points to live as long as `event`.
    unsafe {
        let result = sys::rd_kafka_event_ListOffsets_result(event.ptr());
        let mut count = 0;
        let infos = sys::rd_kafka_ListOffsets_result_infos(result, &raw mut count);
        let entry = |info| entry_of(sys::rd_kafka_ListOffsetsResultInfo_topic_partition(info));
        Ok(items(infos, count).map(entry).collect())
    }
}

/// Sets configuration keys of a topic and leaves every other key as it is.
///
/// rdkafka's `alter_configs` uses the older request, which resets all keys that it is not given.
///
/// # Errors
/// The request failed or the broker refused a value.
pub fn set_topic_configs<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    configs: &[(&str, &str)],
    timeout: Duration,
) -> Result<(), Error> {
    if configs.is_empty() {
        return Ok(());
    }
    let queue = Queue::new(client);
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_INCREMENTALALTERCONFIGS;
    let options = Options::new(client, op, timeout);
    let name = c_string(topic)?;
    let configs =
        configs.iter().map(|(k, v)| Ok((c_string(k)?, c_string(v)?))).collect::<Result<Vec<_>, Error>>()?;
    #[expect(unsafe_code, reason = "IncrementalAlterConfigs is not exposed by rdkafka")]
    // SAFETY: librdkafka copies names and values; the resource is destroyed once on each path.
    unsafe {
        let kind = sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC;
        let mut resource = sys::rd_kafka_ConfigResource_new(kind, name.as_ptr());
        for (key, value) in &configs {
            let set = sys::rd_kafka_AlterConfigOpType_t::RD_KAFKA_ALTER_CONFIG_OP_TYPE_SET;
            let error = sys::rd_kafka_ConfigResource_add_incremental_config(
                resource,
                key.as_ptr(),
                set,
                value.as_ptr(),
            );
            if !error.is_null() {
                let failed = error_of(error);
                sys::rd_kafka_error_destroy(error);
                sys::rd_kafka_ConfigResource_destroy(resource);
                return Err(failed.expect("a non-null error states itself"));
            }
        }
        let rk = client.native_ptr();
        sys::rd_kafka_IncrementalAlterConfigs(rk, &raw mut resource, 1, options.ptr(), queue.ptr());
        sys::rd_kafka_ConfigResource_destroy(resource);
    }
    let event = queue.wait(timeout)?;
    #[expect(unsafe_code, reason = "reads the result of IncrementalAlterConfigs")]
    // SAFETY: the result and what it points to live as long as `event`.
    unsafe {
        let result = sys::rd_kafka_event_IncrementalAlterConfigs_result(event.ptr());
        let mut count = 0;
        let resources = sys::rd_kafka_IncrementalAlterConfigs_result_resources(result, &raw mut count);
        for resource in items(resources, count) {
            if let Some(code) = code_of(sys::rd_kafka_ConfigResource_error(resource)) {
                return Err(Error {
                    code,
                    message: text(sys::rd_kafka_ConfigResource_error_string(resource)),
                });
            }
        }
    }
    Ok(())
}

/// Copies the entries of a list, metadata as bytes.
pub fn entries(list: &TopicPartitionList) -> Vec<Entry> {
    #[expect(unsafe_code, reason = "rdkafka's accessor of metadata panics where it is not UTF-8")]
    // SAFETY: the list is valid as long as it is borrowed.
    unsafe {
        entries_of(list.ptr())
    }
}

/// Iterates over the headers of a message. A name that is not UTF-8 becomes U+FFFD, where rdkafka's own
/// accessor panics; a null value becomes an empty one.
pub fn headers<'m>(message: &'m BorrowedMessage<'_>) -> impl Iterator<Item = (&'m str, &'m [u8])> + use<'m> {
    let mut list = ptr::null_mut();
    #[expect(unsafe_code, reason = "rdkafka's accessor of headers panics where a name is not UTF-8")]
    // SAFETY: the message is valid while borrowed and owns the list.
    let found = unsafe { sys::rd_kafka_message_headers(message.ptr(), &raw mut list) };
    let mut index = 0;
    std::iter::from_fn(move || {
        if code_of(found).is_some() {
            return None;
        }
        let (mut name, mut value, mut size) = (ptr::null(), ptr::null(), 0);
        #[expect(unsafe_code, reason = "reads one header of the list above")]
        // SAFETY: the list lives as long as the borrowed message; past its end an error comes back.
        unsafe {
            let end = sys::rd_kafka_header_get_all(list, index, &raw mut name, &raw mut value, &raw mut size);
            if code_of(end).is_some() {
                return None;
            }
            index += 1;
            let name = CStr::from_ptr(name).to_str().unwrap_or("\u{fffd}");
            let value =
                if value.is_null() { &[] } else { std::slice::from_raw_parts(value.cast::<u8>(), size) };
            Some((name, value))
        }
    })
}

#[expect(unsafe_code, reason = "reads librdkafka's list")]
/// # Safety
/// `list` is null or a valid list.
unsafe fn entries_of(list: *const sys::rd_kafka_topic_partition_list_t) -> Vec<Entry> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a valid list has `cnt` entries at `elems`.
    unsafe {
        let count = usize::try_from((*list).cnt).unwrap_or_default();
        (0..count).map(|i| entry_of((*list).elems.add(i))).collect()
    }
}

#[expect(unsafe_code, reason = "reads an entry of librdkafka's list")]
/// # Safety
/// `entry` is a valid entry.
unsafe fn entry_of(entry: *const sys::rd_kafka_topic_partition_t) -> Entry {
    // SAFETY: the caller vouches for the entry; metadata is null or `metadata_size` bytes long.
    unsafe {
        let entry = &*entry;
        let metadata = match entry.metadata.is_null() {
            true => Vec::new(),
            false => std::slice::from_raw_parts(entry.metadata.cast::<u8>(), entry.metadata_size).to_vec(),
        };
        Entry {
            topic: text(entry.topic),
            partition: entry.partition,
            offset: entry.offset,
            metadata,
            error: code_of(entry.err),
        }
    }
}

fn state_name(state: sys::rd_kafka_consumer_group_state_t) -> String {
    #[expect(unsafe_code, reason = "rdkafka does not expose the names of group states")]
    // SAFETY: librdkafka returns a static string for every state.
    unsafe {
        text(sys::rd_kafka_consumer_group_state_name(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::admin::AdminClient;
    use rdkafka::client::DefaultClientContext;
    use rdkafka::config::ClientConfig;

    #[test]
    fn a_client_that_is_no_consumer_may_not_ask_for_the_offsets_of_groups() {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", "127.0.0.1:1");
        let client: AdminClient<DefaultClientContext> = config.create().expect("a client");
        let refused = group_offsets(client.inner(), &["any"], Duration::from_secs(1));
        assert_eq!(refused.expect_err("refused").code, RDKafkaErrorCode::InvalidArgument);
    }
}
