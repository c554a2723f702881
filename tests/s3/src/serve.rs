//! The HTTP side: connections, turns of writing requests, faults, and the S3 service behind them.

use std::{convert::Infallible, future, io, path::Path, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Response,
    body::{Frame, Incoming},
    header::{CONTENT_LENGTH, RANGE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use s3s::{
    S3Request, S3Result,
    access::S3Access,
    auth::SimpleAuth,
    dto::{CompleteMultipartUploadInput, PutObjectInput},
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tokio::{net::TcpListener, sync::Mutex};

use crate::{Fault, Faults, Request};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;

/// The S3 service and what stands before it.
pub(crate) struct Service {
    s3: S3Service,
    faults: Faults,
    /// Requests that write objects take turns.
    turn: Mutex<()>,
}

/// Lets every signed request in, and drops conditions on demand (after the signature, which covers them, was checked).
struct Access(Faults);

type Checked<'f> = Pin<Box<dyn Future<Output = S3Result<()>> + Send + 'f>>;

// The trait is declared with `async_trait`; these are the signatures it expands to.
impl S3Access for Access {
    fn put_object<'s, 'r, 'f>(&'s self, request: &'r mut S3Request<PutObjectInput>) -> Checked<'f>
    where
        's: 'f,
        'r: 'f,
        Self: 'f,
    {
        if self.0.conditions_ignored() {
            request.input.if_none_match = None;
        }
        Box::pin(future::ready(Ok(())))
    }

    fn complete_multipart_upload<'s, 'r, 'f>(
        &'s self,
        request: &'r mut S3Request<CompleteMultipartUploadInput>,
    ) -> Checked<'f>
    where
        's: 'f,
        'r: 'f,
        Self: 'f,
    {
        if self.0.conditions_ignored() {
            request.input.if_none_match = None;
        }
        Box::pin(future::ready(Ok(())))
    }
}

pub(crate) fn service(folder: &Path, access_key: &str, secret_key: &str, faults: Faults) -> io::Result<Service> {
    let files = FileSystem::new(folder).map_err(|error| io::Error::other(format!("{error:?}")))?;
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(access_key, secret_key));
    builder.set_access(Access(faults.clone()));
    Ok(Service { s3: builder.build(), faults, turn: Mutex::default() })
}

/// Serves connections for ever.
pub(crate) async fn accept(listener: TcpListener, service: Arc<Service>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            // Out of descriptors: some connection ends soon.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        // Small answers must not wait for each other.
        let _ = socket.set_nodelay(true);
        let service = service.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| service.answer(request));
            // A connection that breaks is the client's to notice.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), answer).await;
        });
    }
}

impl Service {
    /// Answers one request; an error cuts the connection.
    async fn answer(&self, request: hyper::Request<Incoming>) -> Result<Response<Body>, BoxError> {
        let target = request.uri().path_and_query().map_or_else(String::new, ToString::to_string);
        let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
        let noted = Request { method: request.method().to_string(), target, range: range.to_owned() };
        match self.faults.take(noted) {
            None => self.forward(request).await,
            Some(Fault::Status(status)) => {
                // What is left unread would be taken for the next request.
                request.into_body().collect().await?;
                status_answer(status)
            }
            Some(Fault::LostAnswer(status)) => {
                self.forward(request).await?.into_body().collect().await?;
                status_answer(status)
            }
            Some(Fault::CutBefore) => Err("cut".into()),
            Some(Fault::CutAfter) => {
                self.forward(request).await?.into_body().collect().await?;
                Err("cut".into())
            }
            Some(Fault::Stall(time)) => {
                tokio::time::sleep(time).await;
                self.forward(request).await
            }
            Some(fault @ (Fault::CutBody | Fault::ShortBody | Fault::FlippedBit)) => {
                let (mut parts, body) = self.forward(request).await?.into_parts();
                let mut bytes = body.collect().await?.to_bytes().to_vec();
                let body = match fault {
                    Fault::CutBody => half_then_cut(bytes),
                    Fault::ShortBody => {
                        bytes.truncate(bytes.len() / 2);
                        parts.headers.insert(CONTENT_LENGTH, bytes.len().into());
                        whole(bytes.into())
                    }
                    _ => {
                        let middle = bytes.len() / 2;
                        bytes.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
                        whole(bytes.into())
                    }
                };
                Ok(Response::from_parts(parts, body))
            }
        }
    }

    async fn forward(&self, request: hyper::Request<Incoming>) -> Result<Response<Body>, BoxError> {
        let query = request.uri().query().unwrap_or_default();
        // A part belongs to one upload, which has one writer; reading needs no turn.
        let writes = match *request.method() {
            Method::PUT => !query.contains("partNumber="),
            Method::POST | Method::DELETE => true,
            _ => false,
        };
        let answered = if writes {
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await?.to_bytes();
            let _turn = self.turn.lock().await;
            self.s3.call(hyper::Request::from_parts(parts, s3s::Body::from(bytes))).await
        } else {
            self.s3.call(request.map(s3s::Body::from)).await
        };
        Ok(answered.map_err(BoxError::from)?.map(BodyExt::boxed_unsync))
    }
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
}

fn status_answer(status: u16) -> Result<Response<Body>, BoxError> {
    let code = match status {
        409 => "ConditionalRequestConflict",
        412 => "PreconditionFailed",
        429 | 503 => "SlowDown",
        _ => "InternalError",
    };
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code></Error>");
    Ok(Response::builder().status(status).body(whole(text.into()))?)
}

/// Half of the bytes, time for them to leave, then an error, at which the connection is closed.
fn half_then_cut(bytes: Vec<u8>) -> Body {
    let half = Bytes::from(bytes);
    let half = half.slice(..half.len() / 2);
    let first = futures::stream::iter([Ok(Frame::data(half))]);
    let cut = futures::stream::once(async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(BoxError::from("cut"))
    });
    StreamBody::new(first.chain(cut)).boxed_unsync()
}
