//! A region in a bucket.
//!
//! Owns: the mapping of the trait to S3 calls, what is checked on the way in and out, time limits of one
//! call. Does not own: retries, classification details (`classify`), client set-up (`client`), when credentials are read again
//! (`renewable`), older versions (`as_of`).
//!
//! Upload: the payload is not hashed with SHA-256 (that hash is two thirds of the client's cost); the CRC-32
//! computed at sealing travels as `x-amz-checksum-crc32`, inside the signature, and the server compares.
//! Download: the length always, the CRC-32 where the server sends the one it keeps. Every answer must carry
//! what only S3 sends (an ETag, a listing); a web page in its place is an error.

mod as_of;
mod body;
mod classify;
mod client;
mod renewable;
mod versions;

pub(crate) use as_of::AsOf;

use std::error::Error;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::builders::GetObjectFluentBuilder;
use aws_sdk_s3::operation::get_object::{GetObjectError, GetObjectOutput};
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::operation::put_object::PutObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::StorageClass;
use bytes::Bytes;

use crate::key::{check_key, check_prefix};
use crate::memory::verify_upload;
use crate::store::MAX_READ;
use crate::{
    ErrorKind, LIST_PAGE, Meta, Object, Operation, Page, Put, PutMode, RegionConfig, Store, StoreError,
};

use body::{crc32_of_base64, crc32_to_base64};
use renewable::Renewable;

/// Bytes per second that a slow but working line is granted on top of the attempt's time limit.
const SLOWEST_LINE: u64 = 1 << 20;

/// Empty pages in a row that one call follows: each is one request, and the caller is to hear of it at some time.
const EMPTY_PAGES: usize = 1000;

/// A region in a bucket.
#[derive(Debug)]
pub(crate) struct S3Store {
    region: String,
    sdk: Renewable,
    bucket: String,
    /// What stands before every key: empty, or ending in a slash.
    base: String,
    storage_class: Option<StorageClass>,
    attempt_timeout: Duration,
    operation_timeout: Duration,
}

impl S3Store {
    /// Builds the client. Sends nothing to the bucket.
    pub(crate) async fn open(
        config: &RegionConfig,
        bucket: String,
        prefix: &str,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            region: config.display_name().to_owned(),
            sdk: Renewable::open(config).await?,
            bucket,
            base: if prefix.is_empty() {
                String::new()
            } else {
                format!("{prefix}/")
            },
            storage_class: config.storage_class.as_deref().map(StorageClass::from),
            attempt_timeout: config.attempt_timeout,
            operation_timeout: config.operation_timeout,
        })
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.base)
    }

    fn error(
        &self,
        kind: ErrorKind,
        operation: Operation,
        key: &str,
        message: impl Into<String>,
    ) -> StoreError {
        StoreError::new(kind, &self.region, operation, key, message)
    }

    /// An answer that S3 would not give.
    fn foreign(&self, operation: Operation, key: &str, what: &str) -> StoreError {
        self.error(
            ErrorKind::Retry,
            operation,
            key,
            format!("the answer is not S3's: {what}"),
        )
        .with_next_step("look for a proxy or a login page between this host and the endpoint")
    }

    /// Waits for the head of an answer to a request of `sent` bytes. Where it asks somebody to act, the next request shows
    /// what that has led to.
    async fn answer<T, E>(
        &self,
        operation: Operation,
        key: &str,
        sent: usize,
        call: impl Future<Output = Result<T, SdkError<E, HttpResponse>>> + Send,
    ) -> Result<Result<T, SdkError<E, HttpResponse>>, StoreError>
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let limit = self.attempt_timeout + Duration::from_secs(sent as u64 / SLOWEST_LINE);
        let limit = limit.min(self.operation_timeout);
        let outcome = tokio::time::timeout(limit, Box::pin(call)).await.map_err(|_| {
            self.error(
                ErrorKind::Retry,
                operation,
                key,
                format!("no answer within {limit:?}"),
            )
            .with_next_step("check the endpoint and the network; attempt_timeout sets the limit")
        })?;
        if outcome.as_ref().is_err_and(classify::is_about_access) {
            self.sdk.refused().await;
        }
        Ok(outcome)
    }

    fn failed<E>(&self, operation: Operation, key: &str, error: SdkError<E, HttpResponse>) -> StoreError
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let error = classify::to_store_error(&self.region, operation, key, error);
        match error.kind() {
            ErrorKind::Config | ErrorKind::Operator => error.at(&self.describe()),
            _ => error,
        }
    }

    /// A read of the newest version, or of another one.
    fn get_request(&self, key: &str, version: Option<&str>) -> GetObjectFluentBuilder {
        self.sdk
            .client()
            .get_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .set_version_id(version.map(str::to_owned))
    }

    /// Sends a read. Whole reads ask for the stored checksum by header and not by the SDK's setting, so that
    /// a mismatch is ours to name.
    async fn send_get(
        &self,
        operation: Operation,
        key: &str,
        request: GetObjectFluentBuilder,
    ) -> Result<Result<GetObjectOutput, SdkError<GetObjectError, HttpResponse>>, StoreError> {
        let call = request.customize().mutate_request(|request| {
            request.headers_mut().insert("x-amz-checksum-mode", "ENABLED");
        });
        self.answer(operation, key, 0, call.send()).await
    }

    /// Runs a whole call, bodies included, under its time limit.
    async fn within<T>(
        &self,
        operation: Operation,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let limit = self.operation_timeout;
        tokio::time::timeout(limit, Box::pin(call))
            .await
            .unwrap_or_else(|_| {
                Err(self
                    .error(
                        ErrorKind::Retry,
                        operation,
                        key,
                        format!("not done within {limit:?}"),
                    )
                    .with_next_step("the line is slow or stalls; operation_timeout sets the limit"))
            })
    }

    fn check_stored(&self, key: &str, crc32: u32, output: &PutObjectOutput) -> Result<(), StoreError> {
        if output.e_tag().is_none() {
            return Err(self.foreign(Operation::Put, key, "a put without an ETag"));
        }
        match output.checksum_crc32().and_then(crc32_of_base64) {
            Some(stored) if stored != crc32 => Err(StoreError::corrupt(
                &self.region,
                Operation::Put,
                key,
                format!("CRC-32 {crc32:08x} was sent and the store confirms {stored:08x}"),
            )),
            _ => Ok(()),
        }
    }

    async fn read_whole(&self, key: &str, version: Option<&str>) -> Result<Bytes, StoreError> {
        let operation = Operation::Get;
        let output = self
            .send_get(operation, key, self.get_request(key, version))
            .await?
            .map_err(|error| self.failed(operation, key, error))?;
        let announced = output.checksum_crc32().and_then(crc32_of_base64);
        let bytes = self.read_body(operation, key, output).await?;
        let actual = announced.map(|_| crc32fast::hash(&bytes));
        if actual != announced {
            return Err(StoreError::corrupt(
                &self.region,
                operation,
                key,
                format!(
                    "{} bytes have CRC-32 {:08x}, stored was {:08x}",
                    bytes.len(),
                    actual.unwrap_or(0),
                    announced.unwrap_or(0)
                ),
            ));
        }
        Ok(bytes)
    }

    async fn read_range(
        &self,
        key: &str,
        range: Range<u64>,
        version: Option<&str>,
    ) -> Result<Bytes, StoreError> {
        let operation = Operation::GetRange;
        // S3 counts in signed 64 bits, and its ranges include their last byte.
        let last = (range.end - 1).min(i64::MAX as u64);
        let request = self
            .get_request(key, version)
            .range(format!("bytes={}-{last}", range.start));
        let output = match self.send_get(operation, key, request).await? {
            Ok(output) => output,
            Err(error) if classify::code(&error) == Some("InvalidRange") => return Ok(Bytes::new()),
            Err(error) => return Err(self.failed(operation, key, error)),
        };
        let part = output.content_range().map(str::to_owned);
        let bytes = self.read_body(operation, key, output).await?;
        let Some(part) = part else {
            // The store ignored the range and sent everything.
            return Ok(crate::memory::clamp(&bytes, &range));
        };
        match body::parse_content_range(&part) {
            Some((start, end, size))
                if start == range.start
                    && end == range.end.min(size)
                    && end - start == bytes.len() as u64 =>
            {
                Ok(bytes)
            }
            _ => Err(self.error(
                ErrorKind::Corrupt,
                operation,
                key,
                format!(
                    "asked for bytes {}..{}, got {} bytes called {part:?}",
                    range.start,
                    range.end,
                    bytes.len()
                ),
            )),
        }
    }

    /// Reads a body to its announced end.
    async fn read_body(
        &self,
        operation: Operation,
        key: &str,
        output: GetObjectOutput,
    ) -> Result<Bytes, StoreError> {
        if output.e_tag().is_none()
            || output
                .content_type()
                .is_some_and(|kind| kind.starts_with("text/html"))
        {
            return Err(self.foreign(operation, key, "an object without an ETag, or a web page"));
        }
        let Some(expected) = output.content_length().and_then(|len| u64::try_from(len).ok()) else {
            return Err(self.foreign(operation, key, "an object without a length"));
        };
        if expected > MAX_READ {
            return Err(self
                .error(
                    ErrorKind::Corrupt,
                    operation,
                    key,
                    format!("it is announced with {expected} bytes: no object of an archive is that large"),
                )
                .with_next_step("find out who put it there; other regions can be read meanwhile"));
        }
        let bytes = body::collect(output.body, expected).await.map_err(|error| {
            self.error(
                ErrorKind::Retry,
                operation,
                key,
                "the connection failed inside the object",
            )
            .with_source(error)
        })?;
        if bytes.len() as u64 == expected {
            return Ok(bytes);
        }
        Err(self.error(
            ErrorKind::Retry,
            operation,
            key,
            format!("{} of {expected} bytes arrived", bytes.len()),
        ))
    }

    /// One page that holds something, or the last one. S3 may pass over what it must not show (deleted versions) and
    /// answer with nothing but a token: only with that token does a listing get beyond it.
    async fn first_filled_page(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        max: usize,
    ) -> Result<ListObjectsV2Output, StoreError> {
        // Starting after the bare prefix passes over the empty "directory" objects that consoles make.
        let after = self.full(start_after.unwrap_or_default());
        let mut token: Option<String> = None;
        for _ in 0..EMPTY_PAGES {
            let call = self
                .sdk
                .client()
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(self.full(prefix))
                .set_start_after((!after.is_empty()).then_some(after.clone()))
                .set_continuation_token(token.clone())
                .max_keys(i32::try_from(max.clamp(1, LIST_PAGE)).unwrap_or(i32::MAX));
            let output = self
                .answer(Operation::List, prefix, 0, call.send())
                .await?
                .map_err(|error| self.failed(Operation::List, prefix, error))?;
            if !output.contents().is_empty() || !output.is_truncated().unwrap_or(false) {
                return Ok(output);
            }
            let next = output.next_continuation_token().map(str::to_owned);
            if next.is_none() || next == token {
                break;
            }
            token = next;
        }
        Err(self.foreign(
            Operation::List,
            prefix,
            "empty pages of a listing that claim more and do not lead to it",
        ))
    }

    fn relative(&self, key: &str, prefix: &str) -> Result<String, StoreError> {
        match key.strip_prefix(&self.base) {
            Some(relative) if relative.starts_with(prefix) => Ok(relative.to_owned()),
            _ => Err(StoreError::corrupt(
                &self.region,
                Operation::List,
                prefix,
                format!("the listing holds {key:?}, which does not begin with what was asked for"),
            )),
        }
    }
}

#[async_trait]
impl Store for S3Store {
    fn region(&self) -> &str {
        &self.region
    }

    fn describe(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.base.trim_end_matches('/'))
    }

    async fn put(&self, key: &str, object: Object, mode: PutMode) -> Result<Put, StoreError> {
        check_key(&self.region, Operation::Put, key)?;
        let call = self
            .sdk
            .client()
            .put_object()
            .bucket(&self.bucket)
            .key(self.full(key))
            .content_type("application/octet-stream")
            .checksum_crc32(crc32_to_base64(object.crc32))
            .set_storage_class(self.storage_class.clone())
            .set_if_none_match((mode == PutMode::Create).then(|| "*".to_owned()))
            .body(ByteStream::from(object.bytes.clone()))
            .customize()
            .disable_payload_signing();
        let error = match self
            .answer(Operation::Put, key, object.bytes.len(), call.send())
            .await?
        {
            Ok(output) => {
                return self
                    .check_stored(key, object.crc32, &output)
                    .map(|()| Put::Created);
            }
            Err(error) => error,
        };
        match classify::status(&error) {
            Some(412) if mode == PutMode::Create => return Ok(Put::Exists),
            // A refused checksum is damage on the way, unless the bytes changed in this machine's memory.
            Some(400) => verify_upload(&self.region, key, &object)?,
            _ => {}
        }
        Err(self.failed(Operation::Put, key, error))
    }

    async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        check_key(&self.region, Operation::Get, key)?;
        self.within(Operation::Get, key, self.read_whole(key, None)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(&self.region, Operation::GetRange, key)?;
        if range.is_empty() {
            // S3 has no empty ranges; ask whether there is an object at all.
            return self.head(key).await.map(|_| Bytes::new());
        }
        self.within(Operation::GetRange, key, self.read_range(key, range, None))
            .await
    }

    async fn head(&self, key: &str) -> Result<Meta, StoreError> {
        check_key(&self.region, Operation::Head, key)?;
        let call = self
            .sdk
            .client()
            .head_object()
            .bucket(&self.bucket)
            .key(self.full(key));
        let output = match self.answer(Operation::Head, key, 0, call.send()).await? {
            Ok(output) => output,
            Err(error) if matches!(classify::status(&error), Some(403 | 404)) => {
                // An answer to HEAD has no body and so no code: it can't tell an absent key from an absent
                // bucket or a proxy's page, nor a right that is missing from a clock that is off. A read of
                // one byte can.
                self.within(Operation::Head, key, self.read_range(key, 0..1, None))
                    .await?;
                let message = "not to be had, and present a moment later";
                return Err(self.error(ErrorKind::Retry, Operation::Head, key, message));
            }
            Err(error) => return Err(self.failed(Operation::Head, key, error)),
        };
        match output.content_length().and_then(|len| u64::try_from(len).ok()) {
            Some(size) if output.e_tag().is_some() => Ok(Meta {
                key: key.to_owned(),
                size,
            }),
            _ => Err(self.foreign(Operation::Head, key, "an object without an ETag or a length")),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, max: usize) -> Result<Page, StoreError> {
        check_prefix(&self.region, Operation::List, prefix)?;
        let output = self.first_filled_page(prefix, start_after, max).await?;
        let mut entries: Vec<Meta> = Vec::with_capacity(output.contents().len());
        for object in output.contents() {
            let key = self.relative(object.key().unwrap_or_default(), prefix)?;
            let size = object
                .size()
                .and_then(|size| u64::try_from(size).ok())
                .unwrap_or(0);
            entries.push(Meta { key, size });
        }
        let after = start_after.unwrap_or_default();
        let ascending = entries.is_sorted_by(|a, b| a.key < b.key)
            && entries.first().is_none_or(|first| first.key.as_str() > after);
        if !ascending {
            return Err(self
                .error(
                    ErrorKind::Config,
                    Operation::List,
                    prefix,
                    "the listing is not in the order of the keys",
                )
                .with_next_step(
                    "use a general purpose bucket: directory buckets do not sort their listings",
                ));
        }
        Ok(Page {
            entries,
            more: output.is_truncated().unwrap_or(false),
        })
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key(&self.region, Operation::Delete, key)?;
        let call = self
            .sdk
            .client()
            .delete_object()
            .bucket(&self.bucket)
            .key(self.full(key));
        match self.answer(Operation::Delete, key, 0, call.send()).await? {
            Ok(_) => Ok(()),
            Err(error) if classify::code(&error) == Some("NoSuchKey") => Ok(()),
            Err(error) => Err(self.failed(Operation::Delete, key, error)),
        }
    }
}
