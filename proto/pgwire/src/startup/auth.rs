//! Login: the startup message, authentication, and what the server says about itself.
//!
//! The server proves itself too: with SCRAM it must show that it knows the password before its
//! "you are in" counts, and with `channel_binding=require` over this very TLS connection.

use bytes::Bytes;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::frontend;
use secrecy::{ExposeSecret, SecretString};

use crate::connection::{Mode, Session};
use crate::conninfo::{AuthMethod, ChannelBinding, ConnInfo};
use crate::error::{PgError, PgErrorKind, ServerError};
use crate::frame::{FrameReader, FrameWriter};
use crate::message::{self, short, tag, take_cstr, take_u32};

const DURING: &str = "authentication";
/// More rounds than any login takes; a server that goes on asking is not one.
const MAX_ROUNDS: usize = 1000;

/// `AuthenticationRequest` codes (protocol.h).
mod request {
    pub(super) const OK: u32 = 0;
    pub(super) const CLEARTEXT: u32 = 3;
    pub(super) const MD5: u32 = 5;
    pub(super) const SASL: u32 = 10;
    pub(super) const SASL_CONTINUE: u32 = 11;
    pub(super) const SASL_FINAL: u32 = 12;
}

/// What a login needs to know.
pub(super) struct Login<'a> {
    pub(super) info: &'a ConnInfo,
    pub(super) mode: Mode,
    pub(super) password: Option<SecretString>,
    pub(super) encrypted: bool,
    pub(super) local: bool,
    pub(super) binding: Option<Vec<u8>>,
}

/// How far authentication has come.
enum Stage {
    /// Nothing was asked for yet.
    Fresh,
    /// A password was sent.
    Sent,
    /// SCRAM runs.
    Scram {
        exchange: Box<ScramSha256>,
        bound: bool,
        answered: bool,
    },
    /// SCRAM ended, and the server proved that it knows the password.
    Proven { bound: bool },
    /// The server let us in.
    In,
}

/// Sends the startup message and goes on until the server is ready for commands.
pub(super) async fn log_in(
    login: &Login<'_>,
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    session: &mut Session,
) -> Result<(), PgError> {
    send_startup(login, writer).await?;
    let connecting = format!("connecting to {} as {:?}", session.target, login.info.user);
    let mut stage = Stage::Fresh;
    for _ in 0..MAX_ROUNDS {
        let frame = reader.expect(&connecting).await?;
        let Some(mut frame) = session.absorb(frame, &connecting)? else {
            continue;
        };
        match frame.tag {
            tag::AUTHENTICATION if !matches!(stage, Stage::In) => {
                stage = login.answer(stage, frame.body, &session.target, writer).await?;
            }
            tag::BACKEND_KEY_DATA => {
                session.pid =
                    take_u32(&mut frame.body).ok_or_else(|| short("BackendKeyData", &connecting))?;
            }
            tag::READY if matches!(stage, Stage::In) => return Ok(()),
            // Only 3.0 is asked for; an older server says which options it does not know.
            tag::NEGOTIATE_VERSION => {}
            tag::ERROR => {
                return Err(PgError::Server(Box::new(ServerError::parse(
                    &connecting,
                    &frame.body,
                ))));
            }
            _ => return Err(message::unexpected(&frame, &connecting)),
        }
    }
    Err(PgError::protocol(
        &connecting,
        format!("no end after {MAX_ROUNDS} messages"),
    ))
}

async fn send_startup(login: &Login<'_>, writer: &mut FrameWriter) -> Result<(), PgError> {
    let info = login.info;
    let mut parameters = vec![
        ("user", info.user.as_str()),
        ("application_name", info.application_name.as_str()),
        ("client_encoding", "UTF8"),
    ];
    match login.mode {
        Mode::Sql => parameters.push(("database", &info.dbname)),
        Mode::Replication => parameters.push(("replication", "true")),
    }
    parameters.extend(info.options.as_deref().map(|options| ("options", options)));
    frontend::startup_message(parameters, &mut writer.pending)
        .map_err(|_| PgError::config("a connection parameter contains a NUL byte", "remove it"))?;
    writer.flush("connecting").await
}

impl Login<'_> {
    fn failed(&self, target: &str, message: impl Into<String>, kind: PgErrorKind) -> PgError {
        PgError::Auth {
            target: target.to_owned(),
            user: self.info.user.clone(),
            message: message.into(),
            kind,
        }
    }

    /// Answers one authentication request.
    async fn answer(
        &self,
        stage: Stage,
        mut body: Bytes,
        target: &str,
        writer: &mut FrameWriter,
    ) -> Result<Stage, PgError> {
        let code = take_u32(&mut body).ok_or_else(|| short("authentication request", DURING))?;
        let next = match (code, stage) {
            (request::OK, stage) => self.enter(&stage, target)?,
            (request::CLEARTEXT, Stage::Fresh) => {
                self.send_cleartext(target, writer)?;
                Stage::Sent
            }
            (request::MD5, Stage::Fresh) => {
                self.send_md5(&body, target, writer)?;
                Stage::Sent
            }
            (request::SASL, Stage::Fresh) => self.begin_scram(body, target, writer)?,
            (
                request::SASL_CONTINUE,
                Stage::Scram {
                    mut exchange,
                    bound,
                    answered: false,
                },
            ) => {
                exchange
                    .update(&body)
                    .map_err(|error| self.scram_failed(target, &error))?;
                put(frontend::sasl_response(exchange.message(), &mut writer.pending))?;
                Stage::Scram {
                    exchange,
                    bound,
                    answered: true,
                }
            }
            (
                request::SASL_FINAL,
                Stage::Scram {
                    mut exchange,
                    bound,
                    answered: true,
                },
            ) => {
                exchange
                    .finish(&body)
                    .map_err(|error| self.scram_failed(target, &error))?;
                Stage::Proven { bound }
            }
            (2 | 6 | 7 | 8 | 9, _) => {
                let message = "the server asks for GSSAPI, SSPI or another way that is not supported; \
                               use scram-sha-256 in pg_hba.conf";
                return Err(self.failed(target, message, PgErrorKind::Unsupported));
            }
            (code, _) => {
                return Err(PgError::protocol(
                    DURING,
                    format!("authentication request {code} has no place here"),
                ));
            }
        };
        writer.flush(DURING).await?;
        Ok(next)
    }

    /// The server says we are in: checks that it had the right to.
    fn enter(&self, stage: &Stage, target: &str) -> Result<Stage, PgError> {
        let bound = match stage {
            Stage::Proven { bound } => *bound,
            Stage::Fresh => {
                self.accept(AuthMethod::None, target)?;
                false
            }
            Stage::Sent => false,
            Stage::Scram { .. } | Stage::In => {
                return Err(PgError::protocol(
                    DURING,
                    "the server skipped its own part of SCRAM; do not trust it",
                ));
            }
        };
        if self.info.channel_binding == ChannelBinding::Require && !bound {
            let message =
                "channel_binding=require, and the server let us in without it; use scram-sha-256 and TLS";
            return Err(self.failed(target, message, PgErrorKind::Operator));
        }
        Ok(Stage::In)
    }

    /// Checks `require_auth`.
    fn accept(&self, method: AuthMethod, target: &str) -> Result<(), PgError> {
        match &self.info.require_auth {
            Some(methods) if !methods.accepts(method) => {
                let message =
                    format!("the server uses authentication method {method}, which require_auth excludes");
                Err(self.failed(target, message, PgErrorKind::Operator))
            }
            _ => Ok(()),
        }
    }

    /// A password may be sent at all: not when the login must be bound to TLS.
    fn password(&self, method: AuthMethod, target: &str) -> Result<&str, PgError> {
        self.accept(method, target)?;
        if self.info.channel_binding == ChannelBinding::Require && method != AuthMethod::ScramSha256 {
            let message = format!("channel_binding=require, and the server uses {method}; use scram-sha-256");
            return Err(self.failed(target, message, PgErrorKind::Operator));
        }
        match &self.password {
            Some(password) => Ok(password.expose_secret()),
            None => {
                let message = "the server asks for a password and none is given: use ~/.pgpass (mode 0600), \
                               PGPASSFILE or PGPASSWORD";
                Err(self.failed(target, message, PgErrorKind::Operator))
            }
        }
    }

    fn send_cleartext(&self, target: &str, writer: &mut FrameWriter) -> Result<(), PgError> {
        let password = self.password(AuthMethod::Password, target)?;
        if !self.encrypted && !self.local {
            tracing::warn!(
                target,
                "the server asked for the password in clear text on an unencrypted connection"
            );
        }
        put(frontend::password_message(
            password.as_bytes(),
            &mut writer.pending,
        ))
    }

    fn send_md5(&self, body: &[u8], target: &str, writer: &mut FrameWriter) -> Result<(), PgError> {
        let salt = <[u8; 4]>::try_from(body).map_err(|_| short("MD5 salt", DURING))?;
        let password = self.password(AuthMethod::Md5, target)?;
        let hash = md5_hash(self.info.user.as_bytes(), password.as_bytes(), salt);
        put(frontend::password_message(hash.as_bytes(), &mut writer.pending))
    }

    fn begin_scram(&self, mut body: Bytes, target: &str, writer: &mut FrameWriter) -> Result<Stage, PgError> {
        let password = self.password(AuthMethod::ScramSha256, target)?;
        let (mut plain, mut plus) = (false, false);
        while let Some(mechanism) = take_cstr(&mut body).filter(|mechanism| !mechanism.is_empty()) {
            plain |= mechanism == sasl::SCRAM_SHA_256;
            plus |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let (binding, mechanism) = self.choose_mechanism(plain, plus, target)?;
        let bound = mechanism == sasl::SCRAM_SHA_256_PLUS;
        let exchange = Box::new(ScramSha256::new(password.as_bytes(), binding));
        put(frontend::sasl_initial_response(
            mechanism,
            exchange.message(),
            &mut writer.pending,
        ))?;
        Ok(Stage::Scram {
            exchange,
            bound,
            answered: false,
        })
    }

    /// Binds wherever both sides can. Saying "I could, you did not offer" otherwise lets the server
    /// notice that somebody took its offer away.
    fn choose_mechanism(
        &self,
        plain: bool,
        plus: bool,
        target: &str,
    ) -> Result<(sasl::ChannelBinding, &'static str), PgError> {
        let wanted = self.info.channel_binding;
        let data = self.binding.clone().filter(|_| wanted != ChannelBinding::Disable);
        match data {
            Some(data) if plus => Ok((
                sasl::ChannelBinding::tls_server_end_point(data),
                sasl::SCRAM_SHA_256_PLUS,
            )),
            _ if wanted == ChannelBinding::Require => {
                let message = "channel_binding=require needs TLS, a server that offers SCRAM-SHA-256-PLUS, and a \
                               certificate whose signature names its hash";
                Err(self.failed(target, message, PgErrorKind::Operator))
            }
            Some(_) if plain => Ok((sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256)),
            None if plain => Ok((sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256)),
            _ => Err(self.failed(
                target,
                "the server offers no SASL mechanism that is supported (SCRAM-SHA-256, SCRAM-SHA-256-PLUS)",
                PgErrorKind::Unsupported,
            )),
        }
    }

    fn scram_failed(&self, target: &str, error: &std::io::Error) -> PgError {
        let message = format!(
            "SCRAM failed: {error}; the server may not know this password, or is not the one it seems"
        );
        self.failed(target, message, PgErrorKind::Operator)
    }
}

fn put(result: std::io::Result<()>) -> Result<(), PgError> {
    result.map_err(|_| PgError::config("the password contains a NUL byte", "remove it"))
}
