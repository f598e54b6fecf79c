//! The S3 operations that Highwater and its tests use, on the objects in memory.
//!
//! Owns: what PUT, GET, HEAD, LIST and DELETE mean (what older versions are is in `versions`). The protocol around them (XML, signatures,
//! chunked bodies) is the s3s crate's; faults are `serve`'s.

use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use s3s::dto::*;
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};

use super::faults::Faults;
use super::multipart::Uploads;
use super::state::{Condition, Query, Refused, Shared, Stored};
use super::versions::{self, Entry};

/// S3 returns at most this many keys at once.
const MAX_KEYS: usize = 1000;

#[derive(Debug)]
pub(super) struct Backend {
    pub(super) shared: Shared,
    pub(super) faults: Faults,
    pub(super) uploads: Uploads,
}

fn refused(refused: Refused) -> S3Error {
    match refused {
        Refused::NoSuchBucket => s3_error!(NoSuchBucket, "The specified bucket does not exist"),
        Refused::Precondition => s3_error!(
            PreconditionFailed,
            "At least one of the preconditions did not hold"
        ),
    }
}

fn encode_crc(crc32: u32) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(crc32.to_be_bytes())
}

fn tag(stored: &Stored) -> ETag {
    ETag::Strong(stored.etag())
}

fn length(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

async fn collect(body: Option<StreamingBlob>, announced: Option<i64>) -> S3Result<Bytes> {
    let Some(mut body) = body else {
        return Ok(Bytes::new());
    };
    let announced = announced
        .and_then(|length| usize::try_from(length).ok())
        .unwrap_or(0);
    let mut whole = BytesMut::with_capacity(announced);
    while let Some(part) = body
        .try_next()
        .await
        .map_err(|_| s3_error!(IncompleteBody, "the body broke off"))?
    {
        whole.extend_from_slice(&part);
    }
    Ok(whole.freeze())
}

/// The CRC-32 that the client sent in a header or after the body.
fn announced_crc(request: &S3Request<PutObjectInput>) -> Option<String> {
    let trailer = || {
        let trailers = request.trailing_headers.as_ref()?;
        trailers.read(|headers| Some(headers.get("x-amz-checksum-crc32")?.to_str().ok()?.to_owned()))?
    };
    request.input.checksum_crc32.clone().or_else(trailer)
}

fn condition(input: &PutObjectInput) -> S3Result<Condition> {
    match (&input.if_none_match, &input.if_match) {
        (None, None) => Ok(Condition::Always),
        (Some(ETagCondition::Any), None) => Ok(Condition::Absent),
        (None, Some(ETagCondition::ETag(tag))) => Ok(Condition::Matches(tag.value().to_owned())),
        _ => Err(s3_error!(NotImplemented, "this combination of conditions")),
    }
}

impl Backend {
    fn find(&self, bucket: &str, key: &str, version: Option<&str>) -> S3Result<std::sync::Arc<Stored>> {
        if let Some(id) = version {
            let found = self.shared.version(bucket, key, id);
            let found =
                found.ok_or_else(|| s3_error!(NoSuchVersion, "The specified version does not exist"))?;
            return found.stored.ok_or_else(|| {
                s3_error!(
                    MethodNotAllowed,
                    "The specified method is not allowed against a delete marker"
                )
            });
        }
        let found = self
            .shared
            .get(bucket, key)
            .ok_or_else(|| refused(Refused::NoSuchBucket))?;
        found.ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist"))
    }
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        if self.shared.has_bucket(&req.input.bucket) {
            return Err(s3_error!(BucketAlreadyOwnedByYou, "the bucket exists"));
        }
        self.shared.create_bucket(&req.input.bucket);
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        if !self.shared.has_bucket(&req.input.bucket) {
            return Err(refused(Refused::NoSuchBucket));
        }
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        if !self.shared.has_bucket(&req.input.bucket) {
            return Err(refused(Refused::NoSuchBucket));
        }
        let condition = match self.faults.ignores_conditions() {
            true => Condition::Always,
            false => condition(&req.input)?,
        };
        let bytes = collect(req.input.body.take(), req.input.content_length).await?;
        if req
            .input
            .content_length
            .is_some_and(|announced| announced != length(bytes.len()))
        {
            return Err(s3_error!(
                IncompleteBody,
                "the body is not as long as its Content-Length"
            ));
        }
        let crc32 = encode_crc(crc32fast::hash(&bytes));
        if announced_crc(&req).is_some_and(|announced| announced != crc32) {
            return Err(s3_error!(
                BadDigest,
                "The CRC32 you specified did not match the calculated checksum"
            ));
        }
        let stored = self
            .shared
            .put(&req.input.bucket, &req.input.key, bytes, &condition)
            .map_err(refused)?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(tag(&stored)),
            checksum_crc32: Some(crc32),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        if !self.shared.has_bucket(&req.input.bucket) {
            return Err(refused(Refused::NoSuchBucket));
        }
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(req.input.bucket),
            key: Some(req.input.key),
            upload_id: Some(self.uploads.begin()),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        mut req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let bytes = collect(req.input.body.take(), req.input.content_length).await?;
        let tag = format!("{:08x}", crc32fast::hash(&bytes));
        if !self
            .uploads
            .part(&req.input.upload_id, req.input.part_number, bytes)
        {
            return Err(s3_error!(NoSuchUpload, "There is no such upload"));
        }
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(ETag::Strong(tag)),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let named = input.multipart_upload.and_then(|upload| upload.parts);
        let numbers: Vec<i32> = named
            .unwrap_or_default()
            .iter()
            .filter_map(|part| part.part_number)
            .collect();
        let whole = self
            .uploads
            .end(&input.upload_id, &numbers)
            .ok_or_else(|| s3_error!(InvalidPart, "One of the parts, or the upload, could not be found"))?;
        let stored = self
            .shared
            .put(&input.bucket, &input.key, whole, &Condition::Always)
            .map_err(refused)?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(tag(&stored)),
            ..Default::default()
        }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let stored = self.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        let whole = stored.bytes.len();
        let (bytes, content_range) = match input.range {
            None => (stored.bytes.clone(), None),
            Some(range) => {
                let range = range.check(whole as u64)?;
                let from = usize::try_from(range.start).unwrap_or(whole);
                let to = usize::try_from(range.end).unwrap_or(whole);
                (
                    stored.bytes.slice(from..to),
                    Some(format!("bytes {from}-{}/{whole}", to.saturating_sub(1))),
                )
            }
        };
        let checked = input.checksum_mode.is_some() && content_range.is_none();
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(length(bytes.len())),
            body: Some(StreamingBlob::from(s3s::Body::from(bytes))),
            content_range,
            accept_ranges: Some("bytes".to_owned()),
            e_tag: Some(tag(&stored)),
            checksum_crc32: checked.then(|| encode_crc(stored.crc32)),
            last_modified: Some(Timestamp::from(stored.at)),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = &req.input;
        let stored = self.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(length(stored.bytes.len())),
            e_tag: Some(tag(&stored)),
            checksum_crc32: req.input.checksum_mode.map(|_| encode_crc(stored.crc32)),
            last_modified: Some(Timestamp::from(stored.at)),
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let asked = input
            .max_keys
            .and_then(|max| usize::try_from(max).ok())
            .unwrap_or(MAX_KEYS);
        let query = Query {
            prefix: &prefix,
            after: input
                .continuation_token
                .as_deref()
                .or(input.start_after.as_deref()),
            max: asked.min(MAX_KEYS),
            hide_newest: self.faults.hidden(),
        };
        let listed = self
            .shared
            .list(&input.bucket, &query)
            .ok_or_else(|| refused(Refused::NoSuchBucket))?;
        let (page, next) = listed;
        let contents: Vec<Object> = page
            .iter()
            .map(|(key, stored)| listed_object(key, stored))
            .collect();
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: i32::try_from(contents.len()).ok(),
            contents: Some(contents),
            is_truncated: Some(next.is_some()),
            next_continuation_token: next,
            max_keys: input.max_keys,
            name: Some(input.bucket),
            prefix: input.prefix,
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            ..Default::default()
        }))
    }

    async fn list_object_versions(
        &self,
        req: S3Request<ListObjectVersionsInput>,
    ) -> S3Result<S3Response<ListObjectVersionsOutput>> {
        let input = req.input;
        let asked = input.max_keys.and_then(|max| usize::try_from(max).ok());
        let after = input.key_marker.as_deref();
        let query = versions::Query {
            prefix: input.prefix.as_deref().unwrap_or_default(),
            after: after.map(|key| (key, input.version_id_marker.as_deref())),
            max: asked.unwrap_or(MAX_KEYS).min(MAX_KEYS),
        };
        let listed = self.shared.versions(&input.bucket, &query);
        let (page, more) = listed.ok_or_else(|| refused(Refused::NoSuchBucket))?;
        let last = page.last().filter(|_| more);
        Ok(S3Response::new(ListObjectVersionsOutput {
            is_truncated: Some(more),
            next_key_marker: last.map(|entry| entry.key.clone()),
            next_version_id_marker: last.map(|entry| entry.version.id.clone()),
            versions: Some(page.iter().filter_map(listed_version).collect()),
            delete_markers: Some(page.iter().filter_map(listed_marker).collect()),
            max_keys: input.max_keys,
            name: Some(input.bucket),
            prefix: input.prefix,
            key_marker: input.key_marker,
            version_id_marker: input.version_id_marker,
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        no_version_goes(req.input.version_id.as_deref())?;
        self.shared
            .delete(&req.input.bucket, &req.input.key)
            .map_err(refused)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let mut deleted = Vec::new();
        for object in req.input.delete.objects {
            no_version_goes(object.version_id.as_deref())?;
            self.shared
                .delete(&req.input.bucket, &object.key)
                .map_err(refused)?;
            deleted.push(DeletedObject {
                key: Some(object.key),
                ..Default::default()
            });
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: Some(deleted),
            ..Default::default()
        }))
    }
}

/// The right to delete versions is one that no key pair has here.
fn no_version_goes(version: Option<&str>) -> S3Result<()> {
    match version {
        None => Ok(()),
        Some(_) => Err(s3_error!(AccessDenied, "Access Denied")),
    }
}

/// The time of a version as AWS gives it: without what is left of the second.
fn to_the_second(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from(SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs()))
}

fn listed_version(entry: &Entry) -> Option<ObjectVersion> {
    let stored = entry.version.stored.as_ref()?;
    Some(ObjectVersion {
        key: Some(entry.key.clone()),
        version_id: Some(entry.version.id.clone()),
        size: Some(length(stored.bytes.len())),
        e_tag: Some(tag(stored)),
        last_modified: Some(to_the_second(entry.version.at)),
        is_latest: Some(entry.newest),
        ..Default::default()
    })
}

fn listed_marker(entry: &Entry) -> Option<DeleteMarkerEntry> {
    entry.version.stored.is_none().then(|| DeleteMarkerEntry {
        key: Some(entry.key.clone()),
        version_id: Some(entry.version.id.clone()),
        last_modified: Some(to_the_second(entry.version.at)),
        is_latest: Some(entry.newest),
        ..Default::default()
    })
}

fn listed_object(key: &str, stored: &Stored) -> Object {
    let at: SystemTime = stored.at;
    Object {
        key: Some(key.to_owned()),
        size: Some(length(stored.bytes.len())),
        e_tag: Some(tag(stored)),
        last_modified: Some(Timestamp::from(at)),
        ..Default::default()
    }
}
