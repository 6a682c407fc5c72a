use axum::body::to_bytes;
use axum::extract::FromRef;
use axum::routing::post;
use axum::{Extension, Router};
use ringback_domain::webhook::signature::{self, SigningKey};
use tower::ServiceExt as _;

use super::*;
use crate::event::{Event, StandardEvent};
use crate::secret::Secrets;
use crate::verify::HostList;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const EVENT: &str = r#"{"id":"e1","type":"usage.limit_warning","created_at":"t","data":{"metric":"m","current_usage":1,"limit":2}}"#;

#[derive(Clone)]
struct Shared(Arc<Trust>);

impl FromRef<Shared> for Arc<Trust> {
    fn from_ref(shared: &Shared) -> Self {
        Self::clone(&shared.0)
    }
}

fn trust() -> Arc<Trust> {
    Arc::new(Trust {
        unsigned: Some(HostList::parse(&["10.0.0.0/8"]).unwrap()),
        max_body_bytes: 1000,
        secrets: Secrets::parse(&[SECRET]).unwrap(),
    })
}

fn app() -> Router {
    let layered = Router::new()
        .route(
            "/layer",
            post(|Extension(event): Extension<Event>, body: Bytes| async move {
                format!("{} {}", event.kind(), body.len())
            }),
        )
        .layer(VerifyLayer::new(trust()));
    Router::new()
        .route("/event", post(|hook: Verified<StandardEvent>| async move { hook.event.kind }))
        .route("/bytes", post(|hook: Verified<Bytes>| async move { format!("{:?}", hook.proof) }))
        .with_state(Shared(trust()))
        .merge(layered)
}

fn signed(path: &str, body: &str, kind: &str) -> Request<Body> {
    let now = now_ms() / 1000;
    let key = SigningKey::parse(SECRET).unwrap().0;
    Request::post(path)
        .header("content-type", kind)
        .header("webhook-id", "msg_1")
        .header("webhook-timestamp", now.to_string())
        .header("webhook-signature", signature::sign(&[key], "msg_1", now, body.as_bytes()))
        .body(Body::from(body.to_owned()))
        .unwrap()
}

async fn answer(request: Request<Body>) -> (u16, String) {
    let response = app().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), 10_000).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_signed_event_comes_through_both() {
    assert_eq!(
        answer(signed("/event", EVENT, "application/json")).await,
        (200, "usage.limit_warning".to_owned())
    );
    let expected = (200, format!("usage.limit_warning {}", EVENT.len()));
    assert_eq!(answer(signed("/layer", EVENT, "application/json; charset=utf-8")).await, expected);
    let (status, proof) = answer(signed("/bytes", "{}", "application/cloudevents+json")).await;
    assert!(status == 200 && proof.contains("msg_1"), "{proof}");
}

#[tokio::test]
async fn everything_else_is_turned_away_with_a_reason() {
    for path in ["/event", "/layer"] {
        let mut altered = signed(path, EVENT, "application/json");
        *altered.body_mut() = Body::from(EVENT.replace('1', "2"));
        let unsigned =
            Request::post(path).header("content-type", "application/json").body(Body::from(EVENT)).unwrap();
        let large = format!("{{\"x\":\"{}\"}}", "y".repeat(2000));
        // Without an announced length.
        let mut endless = signed(path, EVENT, "application/json");
        let chunks =
            futures::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(b"yyyyyyyyyy")));
        *endless.body_mut() = Body::from_stream(chunks);
        for (request, status, code) in [
            (altered, 401, "no_match"),
            (unsigned, 401, "unknown_peer"),
            (signed(path, EVENT, "text/plain"), 415, "not_json"),
            (signed(path, &large, "application/json"), 413, "too_large"),
            (endless, 413, "too_large"),
            (signed(path, "{\"hello\":1}", "application/json"), 400, "invalid_event"),
            (signed(path, "not json", "application/json"), 400, "invalid_event"),
        ] {
            let (got, body) = answer(request).await;
            assert!(got == status && body.contains(code), "{path} {code}: {got} {body}");
            assert!(!body.contains(&SECRET[6..]));
        }
        let (got, _) = answer(Request::get(path).body(Body::empty()).unwrap()).await;
        assert!(got == 405 || (path == "/layer" && got == 415), "{got}");
    }
    let job = r#"{"id":"j","status":"FAILED"}"#;
    let (status, body) = answer(signed("/event", job, "application/json")).await;
    assert!(status == 400 && body.contains("runpod.failed"), "{body}");
}

#[tokio::test]
async fn unsigned_is_judged_by_the_listeners_peer() {
    for (peer, status) in [("10.1.1.1:1", 200), ("8.8.8.8:1", 403)] {
        let mut request = Request::post("/bytes")
            .header("content-type", "application/json")
            .body(Body::from("{}"))
            .unwrap();
        request.extensions_mut().insert(ConnectInfo(peer.parse::<SocketAddr>().unwrap()));
        assert_eq!(answer(request).await.0, status, "{peer}");
    }
}
