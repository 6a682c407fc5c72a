use http::{HeaderName, HeaderValue};
use proptest::prelude::*;
use ringback_domain::webhook::signature::SigningKey;

use super::*;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const STAMP: i64 = 1_614_265_330;
const BODY: &[u8] = br#"{"test": 2432232314}"#;
const V1: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
const RUNFLOW: &str = "80ec8a89ce3cd22133a1066caecb4d04fea7467657c8514d717ec42c38a5c94c";

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
        .collect()
}

fn vector() -> HeaderMap {
    headers(&[("webhook-id", ID), ("webhook-timestamp", "1614265330"), ("webhook-signature", V1)])
}

fn trust(secrets: &[&str]) -> Trust {
    Trust::signed(Secrets::parse(secrets).unwrap())
}

fn open(secrets: &[&str], hosts: &[&str]) -> Trust {
    Trust { unsigned: Some(HostList::parse(hosts).unwrap()), ..trust(secrets) }
}

fn local() -> Option<IpAddr> {
    Some("127.0.0.1".parse().unwrap())
}

#[test]
fn the_published_vector_is_trusted() {
    let proof = Proof::Standard { id: ID.to_owned(), timestamp_s: STAMP };
    assert_eq!(trust(&[SECRET]).verify(&vector(), BODY, None, STAMP), Ok(proof.clone()));
    // The old secret of a rotation, in any place.
    assert_eq!(trust(&["another", SECRET]).verify(&vector(), BODY, None, STAMP), Ok(proof));
}

#[test]
fn the_names_of_svix_are_read_too() {
    let given = headers(&[("svix-id", ID), ("svix-timestamp", "1614265330"), ("svix-signature", V1)]);
    assert!(trust(&[SECRET]).verify(&given, BODY, None, STAMP).is_ok());
}

#[test]
fn each_fault_of_a_signature_has_its_reason() {
    let trust = trust(&[SECRET]);
    let verify = |headers: &HeaderMap, body: &[u8], now| trust.verify(headers, body, None, now).unwrap_err();
    let with = |name: &str, value: &str| {
        let mut given = vector();
        given.insert(name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
        given
    };
    assert_eq!(verify(&vector(), BODY, STAMP + 301), Refusal::TooOld { age_s: 301 });
    assert_eq!(verify(&vector(), BODY, STAMP - 301), Refusal::TooNew { ahead_s: 301 });
    assert_eq!(verify(&vector(), b"{\"test\": 2432232315}", STAMP), Refusal::NoMatch { secrets: 1 });
    assert_eq!(verify(&with("webhook-id", "msg_x"), BODY, STAMP), Refusal::NoMatch { secrets: 1 });
    assert_eq!(
        verify(&with("webhook-timestamp", "1614265331"), BODY, STAMP),
        Refusal::NoMatch { secrets: 1 }
    );
    assert_eq!(verify(&with("webhook-timestamp", "soon"), BODY, STAMP), Refusal::BadTimestamp);
    assert_eq!(verify(&with("webhook-signature", "v1a,AAAA"), BODY, STAMP), Refusal::NoV1);
    assert_eq!(verify(&with("webhook-id", ""), BODY, STAMP), Refusal::BadHeader("webhook-id"));
    let long = "x".repeat(MAX_ID_BYTES + 1);
    assert_eq!(verify(&with("webhook-id", &long), BODY, STAMP), Refusal::BadHeader("webhook-id"));
    for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
        let mut given = vector();
        given.remove(name);
        assert_eq!(verify(&given, BODY, STAMP), Refusal::MissingHeader(name));
        let mut given = vector();
        given.append(name, HeaderValue::from_static("x"));
        assert_eq!(verify(&given, BODY, STAMP), Refusal::RepeatedHeader(name));
    }
    let refused = super::tests::trust(&["wrong"]).verify(&vector(), BODY, None, STAMP);
    assert_eq!(refused, Err(Refusal::NoMatch { secrets: 1 }));
    let small = Trust { max_body_bytes: BODY.len() - 1, ..trust.clone() };
    assert!(matches!(small.verify(&vector(), BODY, None, STAMP), Err(Refusal::TooLarge { .. })));
}

#[test]
fn runflow_takes_the_secret_as_it_is() {
    let given = headers(&[("Runflow-Signature", RUNFLOW)]);
    assert_eq!(trust(&["other", SECRET]).verify(&given, BODY, None, 0), Ok(Proof::Runflow));
    for (secret, body, value) in
        [("other", BODY, RUNFLOW), (SECRET, b"{}".as_slice(), RUNFLOW), (SECRET, BODY, "sha256=00")]
    {
        let given = headers(&[("Runflow-Signature", value)]);
        let refused = trust(&[secret]).verify(&given, body, None, 0).unwrap_err();
        assert!(matches!(refused, Refusal::Runflow { secrets: 1, .. }), "{refused}");
    }
}

#[test]
fn unsigned_needs_the_list_and_the_host_on_it() {
    let none = HeaderMap::new();
    assert_eq!(trust(&[SECRET]).verify(&none, BODY, local(), 0), Err(Refusal::Unsigned));
    let open = open(&[SECRET], &["127.0.0.0/8", "::1", "10.1.0.0/16"]);
    for ip in ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3"] {
        assert!(open.verify(&none, BODY, Some(ip.parse().unwrap()), 0).is_ok(), "{ip}");
    }
    for ip in ["10.2.0.1", "8.8.8.8", "::ffff:8.8.8.8", "2001:db8::1"] {
        let refused = open.verify(&none, BODY, Some(ip.parse().unwrap()), 0);
        assert!(matches!(refused, Err(Refusal::UnsignedHost { .. })), "{ip}");
    }
    assert_eq!(open.verify(&none, BODY, None, 0), Err(Refusal::UnknownPeer));
    let proxied = headers(&[("X-Forwarded-For", "127.0.0.1")]);
    assert_eq!(
        open.verify(&proxied, BODY, local(), 0),
        Err(Refusal::UnsignedThroughProxy("x-forwarded-for"))
    );
    // A wrong signature is not "no signature".
    let mut wrong = vector();
    wrong.insert("webhook-signature", HeaderValue::from_static("v1,AAAA"));
    assert_eq!(open.verify(&wrong, BODY, local(), STAMP), Err(Refusal::NoMatch { secrets: 1 }));
    let runflow = headers(&[("Runflow-Signature", &"0".repeat(64))]);
    assert!(matches!(open.verify(&runflow, BODY, local(), 0), Err(Refusal::Runflow { .. })));
}

#[test]
fn without_any_secret_a_listed_host_may_sign_as_it_likes() {
    assert!(open(&[], &["127.0.0.1"]).verify(&vector(), BODY, local(), 0).is_ok());
    assert_eq!(trust(&[]).verify(&vector(), BODY, local(), STAMP), Err(Refusal::NoSecret));
}

#[test]
fn a_host_list_must_mean_something() {
    assert_eq!(HostList::parse::<&str>(&[]), Err(HostListError::Empty));
    assert!(matches!(HostList::parse(&["0.0.0.0/0"]), Err(HostListError::Everybody(_))));
    assert!(matches!(HostList::parse(&["::/0"]), Err(HostListError::Everybody(_))));
    assert!(matches!(HostList::parse(&["localhost"]), Err(HostListError::NotANetwork(_))));
}

#[test]
fn no_reason_tells_the_secret() {
    let trust = trust(&[SECRET]);
    let refused = trust.verify(&vector(), b"x", None, STAMP).unwrap_err();
    let text = format!("{refused} {refused:?} {trust:?}");
    assert!(!text.contains(&SECRET[6..]), "{text}");
}

fn header_text() -> impl Strategy<Value = String> {
    proptest::collection::vec(0x20_u8..0x7f, 0..80)
        .prop_map(|bytes| String::from_utf8(bytes).unwrap().trim().to_owned())
}

proptest! {
    /// Whatever is in the headers: no panic, and nothing but a signature by the key is trusted.
    #[test]
    fn foreign_headers_are_never_trusted(id in header_text(), stamp in header_text(), list in header_text()) {
        let given = headers(&[("webhook-id", &id), ("webhook-timestamp", &stamp), ("webhook-signature", &list)]);
        prop_assert!(trust(&[SECRET]).verify(&given, BODY, None, STAMP).is_err());
        let given = headers(&[("runflow-signature", &list)]);
        prop_assert!(trust(&[SECRET]).verify(&given, BODY, None, STAMP).is_err());
    }

    /// The right item counts wherever it stands in the list, among anything else.
    #[test]
    fn the_right_item_counts_among_others(
        before in proptest::collection::vec("[!-~]{0,30}", 0..5),
        after in proptest::collection::vec("[!-~]{0,30}", 0..5),
        body in proptest::collection::vec(any::<u8>(), 1..100),
    ) {
        let key = SigningKey::parse(SECRET).unwrap().0;
        let right = signature::sign(&[key], ID, STAMP, &body);
        let mut items = before;
        items.push(right);
        items.extend(after);
        let given = headers(&[
            ("webhook-id", ID),
            ("webhook-timestamp", &STAMP.to_string()),
            ("webhook-signature", items.join(" ").trim()),
        ]);
        prop_assert!(trust(&["other", SECRET]).verify(&given, &body, None, STAMP + 300).is_ok());
        prop_assert!(trust(&["other"]).verify(&given, &body, None, STAMP).is_err());
    }
}
