//! An SDK client from a region's settings.
//!
//! Owns: credentials, region, endpoint, TLS roots, timeouts of the transport. The SDK's retries are off: the
//! only retry layer is [`crate::Retrying`].

use std::net::IpAddr;
use std::path::Path;

use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::region::ProfileFileRegionProvider;
use aws_config::{AppName, BehaviorVersion, ConfigLoader, Region, SdkConfig};
use aws_credential_types::provider::ProvideCredentials as _;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Credentials, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use aws_types::service_config::ServiceConfigKey;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::ExposeSecret;

use crate::{ErrorKind, Operation, RegionConfig, StoreError};

/// Signs for this region where a compatible store is given none: it is what they all accept.
const COMPATIBLE_REGION: &str = "us-east-1";

/// Keeps the SDK from asking the instance's metadata service.
const METADATA_DISABLED: &str = "AWS_EC2_METADATA_DISABLED";

/// A ready client. Reads files and, for the region, may ask the instance's metadata service.
pub(super) async fn client(config: &RegionConfig) -> Result<Client, StoreError> {
    Ok(build(config).await?.0)
}

/// A client that is known to have credentials, which are otherwise looked for when the first request is sent.
pub(super) async fn with_credentials(config: &RegionConfig) -> Result<Client, StoreError> {
    let (client, shared) = build(config).await?;
    if let Some(provider) = shared.credentials_provider() {
        provider.provide_credentials().await.map_err(|error| {
            refuse(config, format!("there are no credentials now: {error}")).with_source(error)
        })?;
    }
    Ok(client)
}

async fn build(config: &RegionConfig) -> Result<(Client, SdkConfig), StoreError> {
    let endpoint = config
        .endpoint
        .as_deref()
        .map(|url| Endpoint::parse(config, url))
        .transpose()?;
    let http = http_client(config, endpoint.as_ref()).await?;
    let shared = shared_config(config, endpoint.is_some(), http.clone()).await?;
    if endpoint.is_none()
        && let Some(url) = surrounding_endpoint(&shared)
    {
        // Checked by the same rules, though it is the SDK that will use it.
        Endpoint::parse(config, &url)?;
    }
    if shared.region().is_none() {
        let metadata = std::env::var(METADATA_DISABLED).ok();
        return Err(without_region(config, metadata.as_deref()));
    }
    let mut builder = aws_sdk_s3::config::Builder::from(&shared)
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(config.connect_timeout)
                .build(),
        )
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled()
                .upload_enabled(true)
                .grace_period(config.attempt_timeout)
                .build(),
        )
        // Checksums are ours: computed once when an object is sealed, compared here when it is read.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .force_path_style(config.path_style.unwrap_or(endpoint.is_some()));
    if let Some(endpoint) = endpoint {
        builder = builder.endpoint_url(endpoint.url);
    }
    if let Some(http) = http {
        builder = builder.http_client(http);
    }
    Ok((Client::from_conf(builder.build()), shared))
}

/// Nobody said which region. Where the metadata service was asked its silence may pass: a machine that has just started must not
/// be left without its agent for that. `disabled`: what the environment says of asking.
fn without_region(config: &RegionConfig, disabled: Option<&str>) -> StoreError {
    let error = if disabled.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        refuse(config, "no AWS region is set")
    } else {
        let message = "no AWS region is set, and no metadata service of an instance tells one";
        StoreError::new(
            ErrorKind::Retry,
            config.display_name(),
            Operation::Open,
            "",
            message,
        )
    };
    error.with_next_step("set region, or AWS_REGION")
}

async fn shared_config(
    config: &RegionConfig,
    compatible: bool,
    http: Option<SharedHttpClient>,
) -> Result<SdkConfig, StoreError> {
    let mut loader: ConfigLoader = aws_config::defaults(BehaviorVersion::latest());
    if let Ok(name) = AppName::new("highwater") {
        loader = loader.app_name(name);
    }
    if let Some(profile) = &config.profile {
        loader = loader.profile_name(profile);
    }
    // A compatible store's own authority may stand before its token service, too.
    if let (Some(http), Some(_)) = (http, &config.ca_file) {
        loader = loader.http_client(http);
    }
    loader = match &config.region {
        Some(region) => loader.region(Region::new(region.clone())),
        // Asking the metadata service for a region makes no sense off AWS, and takes seconds to fail.
        None if compatible => loader.region(local_region(config.profile.as_deref())),
        None => loader,
    };
    if let (Some(id), Some(secret)) = (&config.access_key_id, &config.secret_access_key) {
        let fixed = Credentials::new(id, secret.expose_secret(), None, None, "highwater configuration");
        loader = loader.credentials_provider(fixed);
    }
    Ok(Box::pin(loader.load()).await)
}

fn local_region(profile: Option<&str>) -> RegionProviderChain {
    let mut from_profile = ProfileFileRegionProvider::builder();
    if let Some(profile) = profile {
        from_profile = from_profile.profile_name(profile);
    }
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(from_profile.build())
        .or_else(Region::new(COMPATIBLE_REGION))
}

/// The endpoint that the SDK takes from the environment or the profile: the one for S3, or else the one for everything.
fn surrounding_endpoint(shared: &SdkConfig) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .ok()?;
    let own = shared
        .service_config()
        .and_then(|service| service.load_config(key));
    own.or_else(|| shared.endpoint_url().map(str::to_owned))
}

struct Endpoint {
    url: String,
    tls: bool,
    loopback: bool,
}

impl Endpoint {
    fn parse(config: &RegionConfig, url: &str) -> Result<Self, StoreError> {
        let form = "write https://host or https://host:port";
        let (tls, rest) = match url.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err(refuse(config, format!("the endpoint {url:?} is no URL")).with_next_step(form)),
        };
        let host = host_of(rest.split('/').next().unwrap_or_default());
        if host.is_empty() || rest.contains(['@', '?', '#']) {
            return Err(
                refuse(config, "the endpoint has no host, or holds more than a host").with_next_step(form),
            );
        }
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if !tls && !loopback {
            if !config.allow_http {
                let problem = format!(
                    "the endpoint {url:?} is plain http on another machine: WAL and backups would travel unencrypted, and could be \
                     changed on the way"
                );
                return Err(refuse(config, problem)
                    .with_next_step("write https://, or set allow_http = true for this region if the network is to be trusted"));
            }
            tracing::warn!(
                region = config.display_name(),
                endpoint = url,
                "the endpoint is plain http, which allow_http allows: WAL and backups travel unencrypted"
            );
        }
        Ok(Self {
            url: url.to_owned(),
            tls,
            loopback,
        })
    }
}

fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// The transport where the SDK's default one does not do: own authorities, or no TLS at all (which also
/// works in an image without any certificates).
async fn http_client(
    config: &RegionConfig,
    endpoint: Option<&Endpoint>,
) -> Result<Option<SharedHttpClient>, StoreError> {
    if let Some(path) = &config.ca_file {
        let roots = TrustStore::default().with_pem_certificate(authorities(config, path).await?);
        let tls = TlsContext::builder()
            .with_trust_store(roots)
            .build()
            .map_err(|error| refuse(config, "TLS cannot be set up").with_source(error))?;
        return Ok(Some(tls_client(tls)));
    }
    match endpoint {
        Some(endpoint) if !endpoint.tls => Ok(Some(plain_client(endpoint.loopback))),
        _ => Ok(None),
    }
}

fn tls_client(tls: TlsContext) -> SharedHttpClient {
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = ConnectorBuilder::default()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .tls_context(tls.clone())
            .proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(|components| components.sleep_impl()));
        connector.build()
    })
}

fn plain_client(loopback: bool) -> SharedHttpClient {
    Builder::new().build_with_connector_fn(move |settings, components| {
        let proxy = if loopback {
            ProxyConfig::disabled()
        } else {
            ProxyConfig::from_env()
        };
        let mut connector = ConnectorBuilder::default().proxy_config(proxy);
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(|components| components.sleep_impl()));
        connector.build_http()
    })
}

/// The PEM file, checked here because the transport aborts the process over a bad one.
async fn authorities(config: &RegionConfig, path: &Path) -> Result<Vec<u8>, StoreError> {
    let shown = path.display();
    let pem = tokio::fs::read(path).await.map_err(|error| {
        refuse(config, format!("ca_file {shown} cannot be read: {error}")).with_source(error)
    })?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate =
            certificate.map_err(|error| refuse(config, format!("ca_file {shown} is not PEM: {error:?}")))?;
        roots.add(certificate).map_err(|error| {
            refuse(
                config,
                format!("ca_file {shown} holds a bad certificate: {error}"),
            )
        })?;
    }
    if roots.is_empty() {
        return Err(refuse(config, format!("ca_file {shown} holds no certificate")));
    }
    Ok(pem)
}

fn refuse(config: &RegionConfig, message: impl Into<String>) -> StoreError {
    StoreError::new(
        ErrorKind::Config,
        config.display_name(),
        Operation::Open,
        "",
        message,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_taken_apart() {
        let config = RegionConfig::new("eu", "s3://bucket");
        for (url, tls, loopback) in [
            ("https://minio.example:9000", true, false),
            ("http://127.0.0.1:9000", false, true),
            ("http://[::1]:9000/", false, true),
            ("http://localhost", false, true),
        ] {
            let endpoint = Endpoint::parse(&config, url).unwrap();
            assert_eq!((endpoint.tls, endpoint.loopback), (tls, loopback), "{url}");
        }
        for url in [
            "minio:9000",
            "ftp://x",
            "https://",
            "https://user:secret@host",
            "https://host?x",
            "http://10.0.0.1:80",
            "http://minio:9000",
            "http://localhost.example",
        ] {
            let error = Endpoint::parse(&config, url).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Config, "{url}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn plain_http_to_another_machine_must_be_allowed() {
        let mut config = RegionConfig::new("eu", "s3://bucket");
        let refused = Endpoint::parse(&config, "http://minio:9000").err().unwrap();
        assert!(refused.next_step().contains("allow_http"), "{refused}");
        config.allow_http = true;
        let endpoint = Endpoint::parse(&config, "http://minio:9000").unwrap();
        assert!(!endpoint.tls && !endpoint.loopback);
    }

    #[tokio::test]
    async fn bad_authority_files_are_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let mut config = RegionConfig::new("eu", "s3://bucket");
        config.ca_file = Some(path.clone());
        for content in [
            None,
            Some(""),
            Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ] {
            if let Some(content) = content {
                std::fs::write(&path, content).unwrap();
            }
            let error = authorities(&config, &path).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("ca.pem"), "{error}");
        }
    }
}
