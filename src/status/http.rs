//! The status page, metrics and health checks over HTTP. Invariant: only this host is answered: the listener is on
//! loopback, and a request whose Host names anything else (a web page that rebinds its DNS name) gets nothing.

use std::future::Future;
use std::net::IpAddr;
use std::time::Instant;

use axum::Json;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::handle::StatusHandle;
use super::{listener, metrics};

const PAGE: &str = include_str!("page.html");
/// The page needs nothing from anywhere else and may not be framed.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                           connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
                           frame-ancestors 'none'";

/// Why the status page cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener is not on loopback.
    #[error("the status page was to listen on {0}: it has no password, so give --http a loopback address")]
    NotLoopback(IpAddr),
    /// The listener failed.
    #[error("the listener of the status page failed: {0}")]
    Listener(#[from] std::io::Error),
}

/// The routes of the status page, guarded by [`guard`]. More routes may be merged into it; guard them too.
pub fn router(handle: StatusHandle) -> Router {
    let routes = Router::new()
        .route("/", get(page))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .route("/api/status", get(api_status))
        .with_state(handle);
    guard(routes)
}

/// Makes every route of `router` refuse requests whose Host is not this host's loopback.
pub fn guard(router: Router) -> Router {
    router.layer(from_fn(refuse_strangers))
}

/// Serves until `shutdown` is done and open requests are answered.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let ip = listener.local_addr()?.ip();
    if !ip.is_loopback() {
        return Err(ServeError::NotLoopback(ip));
    }
    listener::serve(listener, router, shutdown).await;
    Ok(())
}

async fn refuse_strangers(request: Request, next: Next) -> Response {
    let named = request.uri().authority().is_none_or(|a| is_loopback(a.as_str()));
    let mut response = match named && host_is_loopback(request.headers()) {
        true => next.run(request).await,
        false => {
            let text = "litemesh: use http://127.0.0.1 or http://localhost on this host\n";
            (StatusCode::FORBIDDEN, text).into_response()
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Whether there is exactly one Host, and it is this host's loopback.
fn host_is_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().is_ok_and(is_loopback),
        _ => false,
    }
}

/// Whether `host`, maybe with a port, can only be this host.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn page() -> impl IntoResponse {
    let headers =
        [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, PAGE_POLICY)];
    (headers, PAGE)
}

async fn healthz(State(handle): State<StatusHandle>) -> (StatusCode, String) {
    let hanging = handle.hanging(Instant::now());
    if hanging.is_empty() {
        return (StatusCode::OK, "ok\n".to_owned());
    }
    let line = |(name, for_how_long): &(String, std::time::Duration)| {
        format!("the loop {name} has not turned for {} s\n", for_how_long.as_secs())
    };
    (StatusCode::SERVICE_UNAVAILABLE, hanging.iter().map(line).collect())
}

async fn readyz(State(handle): State<StatusHandle>) -> (StatusCode, String) {
    let status = handle.current().await;
    if status.ready {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let mut reasons: String = status.not_ready_because.iter().map(|r| format!("{r}\n")).collect();
    if reasons.is_empty() {
        reasons.push_str("the node is starting\n");
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons)
}

async fn metrics_text(State(handle): State<StatusHandle>) -> impl IntoResponse {
    let text = metrics::render(&*handle.current().await, handle.hanging(Instant::now()).len());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)
}

async fn api_status(State(handle): State<StatusHandle>) -> Response {
    Json(handle.current().await.as_ref()).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;
    use crate::status::model::{Status, example};

    /// Serves on a free port, and returns what these requests (path, Host) were answered.
    fn ask(handle: StatusHandle, requests: &[(&str, &str)]) -> Vec<String> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = runtime.spawn(serve(listener, router(handle), async { drop(stopped.await) }));
        let answers = requests.iter().map(|(path, host)| {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let answers = answers.collect();
        stop.send(()).unwrap();
        runtime.block_on(server).unwrap().unwrap();
        answers
    }

    const LOCAL: &str = "Host: localhost:8222\r\n";

    #[test]
    fn a_node_that_is_not_ready_says_why_and_is_healthy_all_the_same() {
        let handle = StatusHandle::new(example());
        handle.beat("engine");
        let answers = ask(
            handle,
            &[
                ("/readyz", LOCAL),
                ("/healthz", LOCAL),
                ("/api/status", LOCAL),
                ("/metrics", LOCAL),
                ("/", LOCAL),
            ],
        );
        assert!(answers[0].starts_with("HTTP/1.1 503") && answers[0].contains("with n3 is not done"));
        assert!(answers[1].starts_with("HTTP/1.1 200") && answers[1].ends_with("ok\n"));
        let json = answers[2].split_once("\r\n\r\n").unwrap().1;
        assert_eq!(serde_json::from_str::<Status>(json).unwrap(), example());
        assert!(answers[3].contains("version=0.0.4") && answers[3].contains("# TYPE litemesh_ready gauge"));
        assert!(answers[4].contains("content-security-policy: default-src 'none'"));
        assert!(answers[4].contains("<!doctype html>"));
    }

    #[test]
    fn a_node_that_is_ready_says_so() {
        let handle = StatusHandle::new(Status { ready: true, ..Status::default() });
        let answers = ask(handle, &[("/readyz", "Host: [::1]:8222\r\n")]);
        assert!(answers[0].starts_with("HTTP/1.1 200") && answers[0].ends_with("\r\n\r\nready\n"));
    }

    #[test]
    fn a_stranger_gets_nothing() {
        let hosts =
            ["Host: evil.example\r\n", "Host: 127.0.0.1.evil.example\r\n", "", "Host: 10.0.0.1:8222\r\n"];
        let requests: Vec<(&str, &str)> = hosts.iter().map(|h| ("/api/status", *h)).collect();
        for answer in ask(StatusHandle::new(example()), &requests) {
            let refused = answer.starts_with("HTTP/1.1 403") || answer.starts_with("HTTP/1.1 400");
            assert!(refused && !answer.contains("orders"), "{answer}");
        }
        let absolute = ask(StatusHandle::default(), &[("http://evil.example/api/status", LOCAL)]);
        assert!(absolute[0].starts_with("HTTP/1.1 403"), "{}", absolute[0]);
    }

    #[test]
    fn hosts_are_told_apart() {
        for local in ["localhost", "LOCALHOST:1", "127.0.0.1:8222", "127.1.2.3", "[::1]", "[::1]:8222"] {
            assert!(is_loopback(local), "{local}");
        }
        for other in ["", "localhost.evil.example", "0.0.0.0", "[::]:1", "example.com:8222", "127.0.0.1@evil"]
        {
            assert!(!is_loopback(other), "{other}");
        }
    }

    #[tokio::test]
    async fn other_addresses_are_refused() {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let answer = serve(listener, Router::new(), std::future::ready(())).await;
        assert!(matches!(answer, Err(ServeError::NotLoopback(_))));
    }
}
