use alloc::vec;

use proptest::prelude::*;

use super::*;

#[test]
fn numbers_of_the_header() {
    let known: Vec<u32> = (0..100).filter(|raw| Kind::from_raw(*raw).is_some()).collect();
    assert_eq!(known, (0..=19).chain(21..=22).collect::<Vec<u32>>());
    for raw in known {
        assert_eq!(Kind::from_raw(raw).map(Kind::raw), Some(raw));
    }
    assert_eq!(Kind::WatchEvent.raw(), 15);
    assert_eq!(Kind::DirectoryPart.raw(), 22);
    assert_eq!(Kind::from_raw(0xffff), None);
}

#[test]
fn a_header_on_the_wire() {
    let header =
        Header { raw_kind: 11, req_id: ReqId(0x0102_0304), tx_id: TxId(0xa0b0_c0d0), len: 258 };
    let bytes = [11, 0, 0, 0, 4, 3, 2, 1, 0xd0, 0xc0, 0xb0, 0xa0, 2, 1, 0, 0];
    assert_eq!(header.encode(), bytes);
    assert_eq!(Header::decode(&bytes), header);
}

#[test]
fn errors_by_name() {
    assert_eq!(XsError::ALL.len(), 16);
    for error in XsError::ALL {
        assert_eq!(XsError::from_text(error.text().as_bytes()), Some(*error));
    }
    assert_eq!(XsError::E2BIG.text(), "E2BIG");
    assert_eq!(XsError::from_text(b"EQUOTA"), None);
    assert_eq!(XsError::from_text(b"EINVAL\0"), None);
}

#[test]
fn permissions() {
    let perms = [Perm::new(Access::None, DomId(0)), Perm::new(Access::Both, DomId(65535))];
    assert_eq!(format_perms(&perms), "n0\0b65535\0");
    assert_eq!(parse_perms(b"n0\0b65535\0"), Some(perms.to_vec()));
    let bad: [&[u8]; 9] =
        [b"", b"n0", b"n\0", b"x0\0", b"n65536\0", b"n-1\0", b"n0\0\0", b"N0\0", b"r 5\0"];
    for payload in bad {
        assert_eq!(parse_perms(payload), None, "{payload:?}");
    }
}

#[test]
fn strings() {
    assert_eq!(split_nul(b"a\0b"), Some((&b"a"[..], &b"b"[..])));
    assert_eq!(split_nul(b"ab"), None);
    assert_eq!(single_string(b"ab\0"), Some(&b"ab"[..]));
    assert_eq!(single_string(b"\0"), Some(&b""[..]));
    for bad in [&b""[..], b"ab", b"a\0b\0", b"a\0\0"] {
        assert_eq!(single_string(bad), None);
    }
}

#[test]
fn decimal_is_strict() {
    for (text, number) in
        [("0", 0), ("12", 12), ("4294967295", u32::MAX), ("0000000007", 7), ("00", 0)]
    {
        assert_eq!(parse_u32(text.as_bytes()), Some(number));
    }
    for text in [
        "",
        "12abc",
        " 12",
        "12 ",
        "+1",
        "-1",
        "0x10",
        "\0",
        "1\0",
        "4294967296",
        "9999999999",
        "00000000001",
        "1.0",
        "\u{0661}",
    ] {
        assert_eq!(parse_u32(text.as_bytes()), None, "{text:?}");
    }
}

#[test]
fn paths() {
    let home = |domid: &str, len: usize| {
        [b"/local/domain/", domid.as_bytes(), b"/", &vec![b'x'; len]].concat()
    };
    let good = [
        b"/".to_vec(),
        b"/a/B/0-_@".to_vec(),
        [&b"/"[..], &vec![b'x'; REL_PATH_MAX - 1]].concat(),
        home("1", REL_PATH_MAX),
        home("65535", REL_PATH_MAX),
    ];
    for path in &good {
        assert!(valid_path(path), "{path:?}");
        assert!(path.len() <= ABS_PATH_MAX);
        assert!(!valid_relative_path(path) && !valid_special_path(path));
    }
    let bad = [
        b"".to_vec(),
        b"a".to_vec(),
        b"//".to_vec(),
        b"/a/".to_vec(),
        b"/a//b".to_vec(),
        b"/a b".to_vec(),
        b"/a\0".to_vec(),
        b"/a.b".to_vec(),
        b"/\xc3\xa4".to_vec(),
        b"@introduceDomain".to_vec(),
        [&b"/"[..], &vec![b'x'; REL_PATH_MAX]].concat(),
        home("1", REL_PATH_MAX + 1),
        home("123456", REL_PATH_MAX),
        home("x", REL_PATH_MAX),
    ];
    for path in bad {
        assert!(!valid_path(&path), "{path:?}");
    }
    assert!(valid_relative_path(b"device/vif/0") && valid_relative_path(b"a"));
    for path in [&b""[..], b"a/", b"a//b", b"a b", b"@a", &vec![b'x'; REL_PATH_MAX + 1]] {
        assert!(!valid_relative_path(path));
    }
    assert!(valid_special_path(b"@releaseDomain/3"));
    assert!(!valid_special_path(b"@") && !valid_special_path(b"@a b"));
}

#[test]
fn a_length_over_the_limit_ends_the_stream() {
    let mut out = vec![];
    assert_eq!(
        write_message(&mut out, 2, ReqId(1), TxId::NONE, &[&[0; 4096], b"x"]),
        Err(PayloadTooLong)
    );
    assert_eq!(out, []);
    write_message(&mut out, 2, ReqId(1), TxId::NONE, &[&[7; 4000], &[8; 96]]).unwrap();
    let mut framer = Framer::new();
    let message = framer.next(&mut out.as_slice()).unwrap().unwrap();
    assert_eq!(message.payload.len(), PAYLOAD_MAX);
    assert!(framer.is_idle());

    let header = Header { raw_kind: 2, req_id: ReqId(1), tx_id: TxId::NONE, len: 4097 };
    assert_eq!(framer.next(&mut &header.encode()[..]), Err(PayloadTooLong));
    assert_eq!(framer.next(&mut out.as_slice()), Err(PayloadTooLong));
    assert!(!framer.is_idle());
}

fn messages() -> impl Strategy<Value = Vec<(u32, u32, u32, Vec<u8>)>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        prop::collection::vec(any::<u8>(), PAYLOAD_MAX - 1..=PAYLOAD_MAX),
    ];
    prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>(), payload), 0..8)
}

proptest! {
    #[test]
    fn a_stream_may_be_cut_anywhere(sent in messages(), cuts in prop::collection::vec(1..60usize, 1..20)) {
        let mut bytes = vec![];
        for (kind, req, tx, payload) in &sent {
            write_message(&mut bytes, *kind, ReqId(*req), TxId(*tx), &[payload]).unwrap();
        }
        let mut framer = Framer::new();
        let mut got = vec![];
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (mut now, later) = rest.split_at(rest.len().min(*cut));
            rest = later;
            while let Some(Message { header, payload }) = framer.next(&mut now).unwrap() {
                prop_assert_eq!(header.len as usize, payload.len());
                got.push((header.raw_kind, header.req_id.0, header.tx_id.0, payload));
            }
            prop_assert!(now.is_empty());
        }
        prop_assert!(framer.is_idle());
        prop_assert_eq!(got, sent);
    }

    #[test]
    fn garbage_never_panics(chunks: Vec<Vec<u8>>, text: Vec<u8>) {
        let mut framer = Framer::new();
        for chunk in chunks {
            let mut rest = chunk.as_slice();
            while let Ok(Some(message)) = framer.next(&mut rest) {
                prop_assert!(message.payload.len() <= PAYLOAD_MAX);
            }
        }
        let _ = (parse_perms(&text), valid_path(&text), valid_relative_path(&text));
        let expected = core::str::from_utf8(&text).ok().filter(|text| {
            text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit())
        });
        prop_assert_eq!(parse_u32(&text), expected.and_then(|text| text.parse().ok()));
    }

    #[test]
    fn every_number_is_read(number: u32) {
        prop_assert_eq!(parse_u32(alloc::format!("{number}").as_bytes()), Some(number));
    }

    #[test]
    fn permissions_survive_the_wire(list in prop::collection::vec((0..4usize, any::<u16>()), 1..20)) {
        let access = [Access::None, Access::Read, Access::Write, Access::Both];
        let perms: Vec<Perm> =
            list.into_iter().map(|(a, domid)| Perm::new(access[a], DomId(domid))).collect();
        prop_assert_eq!(parse_perms(format_perms(&perms).as_bytes()), Some(perms));
    }
}
