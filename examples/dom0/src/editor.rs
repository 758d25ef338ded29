//! A line being typed at a terminal: bytes in, the echo and whole lines out.

use alloc::string::String;

/// Bytes that a line may have; what is typed beyond is refused with a bell.
const LONGEST: usize = 256;

const BELL: char = '\x07';
const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;
const ESCAPE: u8 = 0x1b;
const CTRL_C: u8 = 0x03;
const CTRL_U: u8 = 0x15;

/// Where in a key's escape sequence we are: arrows and the like are swallowed whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Sequence {
    #[default]
    None,
    /// ESC came.
    Started,
    /// `ESC [` came: it ends with the first byte of `@` to `~`.
    Parameters,
    /// `ESC O` came: one more byte.
    Last,
}

/// A line being typed. Printable ASCII, Backspace, Ctrl-U and Ctrl-C mean something; all else is passed over.
#[derive(Debug, Default)]
pub(crate) struct Editor {
    line: String,
    sequence: Sequence,
    /// The last byte was a carriage return: a line feed after it ends the same line.
    returned: bool,
}

impl Editor {
    /// What has been typed of the line so far.
    pub(crate) fn line(&self) -> &str {
        &self.line
    }

    /// Takes a byte, and adds to `echo` what the terminal is to show for it. Gives the line if this ended it.
    pub(crate) fn take(&mut self, byte: u8, echo: &mut String) -> Option<String> {
        let returned = core::mem::replace(&mut self.returned, byte == b'\r');
        if self.in_sequence(byte) {
            return None;
        }
        match byte {
            b'\n' if returned => {}
            b'\r' | b'\n' => {
                echo.push('\n');
                return Some(core::mem::take(&mut self.line));
            }
            BACKSPACE | DELETE => {
                let back = self.line.pop().map_or("", |_| "\x08 \x08");
                echo.push_str(back);
            }
            CTRL_U => {
                for _ in 0..self.line.len() {
                    echo.push_str("\x08 \x08");
                }
                self.line.clear();
            }
            CTRL_C => {
                echo.push_str("^C\n");
                self.line.clear();
            }
            b' '..=b'~' if self.line.len() < LONGEST => {
                self.line.push(byte.into());
                echo.push(byte.into());
            }
            b' '..=b'~' => echo.push(BELL),
            _ => {}
        }
        None
    }

    fn in_sequence(&mut self, byte: u8) -> bool {
        let next = match (self.sequence, byte) {
            (_, ESCAPE) => Sequence::Started,
            (Sequence::None, _) => return false,
            (Sequence::Started, b'[') => Sequence::Parameters,
            (Sequence::Started, b'O') => Sequence::Last,
            (Sequence::Parameters, b' '..=b'?') => Sequence::Parameters,
            // Its last byte, or no sequence at all: a control character is never part of one.
            (_, byte) if byte >= b' ' => Sequence::None,
            _ => {
                self.sequence = Sequence::None;
                return false;
            }
        };
        self.sequence = next;
        true
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;

    fn typed(bytes: &[u8]) -> (Vec<String>, String, String) {
        let (mut editor, mut echo) = (Editor::default(), String::new());
        let lines = bytes.iter().filter_map(|byte| editor.take(*byte, &mut echo)).collect();
        (lines, editor.line().to_string(), echo)
    }

    #[test]
    fn lines_end_with_either_key_or_both() {
        let (lines, rest, echo) = typed(b"one\rtwo\nthree\r\nfo");
        assert_eq!(lines, ["one", "two", "three"]);
        assert_eq!(rest, "fo");
        assert_eq!(echo, "one\ntwo\nthree\nfo");
        assert_eq!(typed(b"\n\r\r\n").0, ["", "", ""]);
    }

    #[test]
    fn what_was_typed_can_be_taken_back() {
        assert_eq!(typed(b"ab\x7f\x08\x08cd\n").0, ["cd"]);
        assert_eq!(typed(b"abc\x15d\n").0, ["d"]);
        assert_eq!(typed(b"abc\x03d\n").0, ["d"]);
        assert_eq!(typed(b"ab\x15").2, "ab\x08 \x08\x08 \x08");
    }

    #[test]
    fn keys_that_mean_nothing_leave_nothing() {
        assert_eq!(typed(b"a\x1b[Ab\x1b[1;5Cc\x1bOPd\x1bxe\xc3\xa9\x01\0f\n").0, ["abcdef"]);
        // An end of line ends a sequence that never ended itself.
        assert_eq!(typed(b"a\x1b\nb\x1b[1\n").0, ["a", "b"]);
    }

    #[test]
    fn a_line_has_an_end() {
        let (lines, rest, echo) = typed(&[b'x'; LONGEST + 10]);
        assert_eq!((lines, rest.len()), (vec![], LONGEST));
        assert_eq!(echo.matches(BELL).count(), 10);
    }

    #[test]
    fn any_bytes_are_bounded_and_break_nothing() {
        let mut state = 1_u32;
        let noise: Vec<u8> = (0..100_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let (lines, rest, _) = typed(&noise);
        assert!(lines.iter().chain([&rest]).all(|line| line.len() <= LONGEST));
        assert!(lines.iter().all(|line| line.bytes().all(|byte| matches!(byte, b' '..=b'~'))));
    }
}
