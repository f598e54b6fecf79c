//! From an S3 answer, or the lack of one, to what the caller can do about it.
//!
//! Decided by status and error code, never by text. Two rules matter more than the table: "no such key" is
//! believed only when S3's own code says so (a proxy's 404 page must not end a recovery early), and an
//! answer that isn't S3's is worth another try, never an object.

use std::error::Error;
use std::io;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::{RequestId, RequestIdExt};
use rustls::CertificateError;

use crate::{ErrorKind, Operation, StoreError};

/// The error code of a failed call, where the store sent one.
pub(super) fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error().and_then(ProvideErrorMetadata::code)
}

/// The HTTP status of a failed call, where there was an answer.
pub(super) fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|raw| raw.status().as_u16())
}

pub(super) fn to_store_error<E>(
    region: &str,
    operation: Operation,
    key: &str,
    error: SdkError<E, HttpResponse>,
) -> StoreError
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    let (kind, message, advice) = verdict(&error);
    let told = StoreError::new(kind, region, operation, key, message).with_source(error);
    match advice {
        Some(advice) => told.with_next_step(advice),
        None => told,
    }
}

/// Whether other credentials, or another authority, may be what it takes.
pub(super) fn is_about_access<E>(error: &SdkError<E, HttpResponse>) -> bool
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    verdict(error).0 == ErrorKind::Operator && !is_about_space_or_keys(status(error), code(error))
}

/// A full store, an archive tier, or the bucket's own encryption: whoever asks has no part in that.
fn is_about_space_or_keys(status: Option<u16>, code: Option<&str>) -> bool {
    let named = code.is_some_and(|code| {
        let of_space = [
            "QuotaExceeded",
            "XMinioStorageFull",
            "InsufficientStorage",
            "InvalidObjectState",
        ];
        of_space.contains(&code) || code.starts_with("KMS")
    });
    named || status == Some(507)
}

type Verdict = (ErrorKind, String, Option<String>);

fn verdict<E>(error: &SdkError<E, HttpResponse>) -> Verdict
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    match error {
        SdkError::ServiceError(_) | SdkError::ResponseError(_) => answered(error),
        _ => unanswered(error),
    }
}

fn answered<E>(error: &SdkError<E, HttpResponse>) -> Verdict
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    let status = status(error).unwrap_or(0);
    let code = code(error);
    let meta = error.as_service_error().map(ProvideErrorMetadata::meta);
    let mut message = match code {
        Some(code) => format!("S3 answered {status} {code}"),
        None => format!("HTTP {status}, and the answer is not S3's"),
    };
    if let Some(text) = meta.and_then(|meta| meta.message()) {
        message.push_str(": ");
        message.push_str(text);
    }
    if let Some(id) = error.request_id() {
        message.push_str(&format!(" [request {id}"));
        if let Some(id) = error.extended_request_id() {
            message.push_str(&format!(", {id}"));
        }
        message.push(']');
    }
    let (kind, advice) = by_code(status, code);
    let home = error
        .raw_response()
        .and_then(|raw| raw.headers().get("x-amz-bucket-region"));
    let advice = match (kind, home) {
        (ErrorKind::Config, Some(home)) => Some(format!("the bucket is in {home}: set region = \"{home}\"")),
        _ => advice.map(str::to_owned),
    };
    (kind, message, advice)
}

/// The table: what a status and an error code mean for the caller.
pub(super) fn by_code(status: u16, code: Option<&str>) -> (ErrorKind, Option<&'static str>) {
    use ErrorKind::{Config, NotFound, Operator, Retry};
    match (status, code) {
        (_, Some("NoSuchKey")) => (NotFound, None),
        (_, Some("NoSuchBucket")) => (
            Config,
            Some("create the bucket, or correct the url, region or endpoint"),
        ),
        (
            _,
            Some(
                "PermanentRedirect"
                | "AuthorizationHeaderMalformed"
                | "IllegalLocationConstraintException"
                | "IncorrectEndpoint",
            ),
        ) => (Config, Some("set region (and endpoint) to where the bucket is")),
        (_, Some("InvalidBucketName")) => (Config, Some("correct the bucket in the url")),
        (_, Some("InvalidStorageClass")) => (
            Config,
            Some("correct storage_class; the store does not know the one that is set"),
        ),
        (501, _) | (_, Some("NotImplemented")) => (
            Config,
            Some("the store lacks something the archive needs; see the notes on S3-compatible stores"),
        ),
        (_, Some("AccessDenied" | "AllAccessDisabled" | "AccountProblem")) => (
            Operator,
            Some(
                "grant s3:PutObject and s3:GetObject on the prefix and s3:ListBucket on the bucket \
                 (without s3:ListBucket an absent key is answered with 403, too); to read as of an earlier time \
                 also s3:GetObjectVersion and s3:ListBucketVersions",
            ),
        ),
        (_, Some("InvalidAccessKeyId" | "InvalidToken" | "InvalidSecurity")) => (
            Operator,
            Some("the key id is unknown to the store: give current credentials of the right account"),
        ),
        (_, Some("SignatureDoesNotMatch")) => (
            Operator,
            Some(
                "the secret does not belong to the key id; give both again, or look for a proxy that changes requests",
            ),
        ),
        (_, Some("ExpiredToken" | "TokenRefreshRequired")) => (
            Operator,
            Some("the session token has expired: renew it, or use credentials that renew themselves"),
        ),
        (_, Some("InvalidObjectState")) => (
            Operator,
            Some("a lifecycle rule moved the object to an archive tier: restore it there first"),
        ),
        (_, Some("RequestTimeTooSkewed")) => (
            Retry,
            Some("the clocks differ by more than 15 minutes: check this host's time"),
        ),
        (507, _) | (_, Some("QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage")) => {
            (Operator, Some("the store is full: raise the quota or free space"))
        }
        (_, Some(code)) if code.starts_with("KMS") => (
            Operator,
            Some("grant the use of the bucket's KMS key, and check that it is enabled"),
        ),
        (_, Some("MethodNotAllowed")) => (Config, Some("the endpoint is not an S3 endpoint for this bucket")),
        (
            _,
            Some(
                "InvalidRequest" | "InvalidArgument" | "MalformedXML" | "EntityTooLarge" | "KeyTooLongError",
            ),
        ) => (
            Config,
            Some("the store refuses the request's form; see the notes on S3-compatible stores"),
        ),
        (403, Some(_)) => (
            Operator,
            Some("the store refuses these credentials; see its message"),
        ),
        (403, None) => (
            Operator,
            Some("the store, or a proxy before it, refuses the request; check credentials and grants"),
        ),
        // ConditionalRequestConflict (409), BadDigest (damage on the way), SlowDown, RequestTimeout, 5xx, 404
        // without NoSuchKey, HTML pages, and whatever is not known: another try is the safe answer.
        _ => (Retry, None),
    }
}

/// Why a server is not believed to be itself.
fn certificate(fault: &CertificateError) -> Verdict {
    use CertificateError::{NotValidForName, NotValidForNameContext};
    let next = match fault {
        NotValidForName | NotValidForNameContext { .. } => {
            "name the endpoint as its certificate does, or have it certified for the name that is used"
        }
        _ => "set ca_file to the authority that signed it, or renew it",
    };
    let what = format!("the server's certificate is not accepted: {fault}");
    (ErrorKind::Operator, what, Some(next.to_owned()))
}

fn unanswered<E>(error: &SdkError<E, HttpResponse>) -> Verdict
where
    E: Error + Send + Sync + 'static,
{
    for cause in causes(error) {
        if let Some(error) = cause.downcast_ref::<CredentialsError>() {
            return credentials(error);
        }
        if let Some(rustls::Error::InvalidCertificate(fault)) = cause.downcast_ref() {
            return certificate(fault);
        }
    }
    let text = chain(error);
    match error {
        SdkError::ConstructionFailure(_) => (
            ErrorKind::Config,
            format!("the request cannot be made: {text}"),
            None,
        ),
        SdkError::TimeoutError(_) => (ErrorKind::Retry, "no answer in time".to_owned(), None),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => {
            (ErrorKind::Retry, format!("no answer in time: {text}"), None)
        }
        SdkError::DispatchFailure(failure) if failure.is_user() => (
            ErrorKind::Config,
            format!("the endpoint cannot be used: {text}"),
            None,
        ),
        _ => (
            ErrorKind::Retry,
            format!("the connection failed: {text}"),
            Some("check that the endpoint is up and can be reached from here".to_owned()),
        ),
    }
}

/// What happened, from the outside in, each layer's words once.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&words);
        }
    }
    text
}

fn credentials(error: &CredentialsError) -> Verdict {
    let text = chain(error);
    let advice = "give the process credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a web identity \
                  token, or an instance or container role";
    match error {
        CredentialsError::ProviderTimedOut(_) => (ErrorKind::Retry, format!("credentials: {text}"), None),
        CredentialsError::InvalidConfiguration(_) => (
            ErrorKind::Config,
            format!("the credentials are not configured right: {text}"),
            None,
        ),
        CredentialsError::CredentialsNotLoaded(_) => (
            ErrorKind::Operator,
            "no credentials were found".to_owned(),
            Some(advice.to_owned()),
        ),
        // A metadata or token service that failed; it may be back, or need someone.
        _ => (
            ErrorKind::Operator,
            format!("credentials could not be had: {text}"),
            Some(advice.to_owned()),
        ),
    }
}

/// The chain of causes, looking into I/O errors, whose `source` skips what they wrap.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let current = next?;
        next = match current.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped as &(dyn Error + 'static)),
            None => current.source(),
        };
        Some(current)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_what_to_do() {
        use ErrorKind::{Config, NotFound, Operator, Retry};
        for (status, code, kind) in [
            (404, Some("NoSuchKey"), NotFound),
            (404, Some("NoSuchBucket"), Config),
            (301, Some("PermanentRedirect"), Config),
            (400, Some("AuthorizationHeaderMalformed"), Config),
            (307, Some("TemporaryRedirect"), Retry),
            (403, Some("AccessDenied"), Operator),
            (403, Some("InvalidAccessKeyId"), Operator),
            (403, Some("SignatureDoesNotMatch"), Operator),
            (400, Some("ExpiredToken"), Operator),
            (403, Some("RequestTimeTooSkewed"), Retry),
            (409, Some("ConditionalRequestConflict"), Retry),
            (409, Some("OperationAborted"), Retry),
            (400, Some("BadDigest"), Retry),
            (400, Some("RequestTimeout"), Retry),
            (503, Some("SlowDown"), Retry),
            (500, Some("InternalError"), Retry),
            (501, Some("NotImplemented"), Config),
            (403, Some("InvalidObjectState"), Operator),
            (400, Some("KMS.DisabledException"), Operator),
        ] {
            assert_eq!(by_code(status, code).0, kind, "{status} {code:?}");
        }
    }

    #[test]
    fn answers_without_a_code_are_never_not_found() {
        for status in [200, 301, 404, 408, 429, 500, 502, 503, 504] {
            assert_eq!(by_code(status, None).0, ErrorKind::Retry, "{status}");
        }
        assert_eq!(by_code(403, None).0, ErrorKind::Operator);
        assert_eq!(by_code(507, None).0, ErrorKind::Operator);
    }

    #[test]
    fn a_bad_certificate_is_found_inside_io_errors() {
        let tls = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let io = io::Error::new(io::ErrorKind::InvalidData, tls);
        let found = causes(&io).any(|cause| cause.downcast_ref::<rustls::Error>().is_some());
        assert!(found);
    }
}
