//! The operator's commands: a line in, an answer out, with the store in between.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use xenbus::client::{Change, Client, Error, Event, JobId, Outcome};

/// Children that `ls` shows.
const CHILDREN: usize = 128;
/// Where `ls` looks if it is not told.
const HOME: &str = "/local/domain/0";

const HELP: &str = "\
ls [PATH]          the children of a node, with their values
read PATH          the value of a node
write PATH [VALUE] sets it; all after PATH and a blank is the value
rm PATH            removes a node and all below it
vifs               what all interfaces are at, and what they and the network card have carried
Paths are absolute, or below /local/domain/0. netback/withdrawn holds what netback is to do without.
";

/// What a command waits for.
enum Pending {
    Value(JobId),
    Children { job: JobId, path: String },
    Values { job: JobId, names: Vec<String>, left: usize },
    Change(JobId),
}

impl Pending {
    fn job(&self) -> JobId {
        match self {
            Self::Value(job)
            | Self::Children { job, .. }
            | Self::Values { job, .. }
            | Self::Change(job) => *job,
        }
    }
}

/// One command at a time. An answer is ASCII, and its last line is `ok` or begins with `error: `.
#[derive(Default)]
pub(crate) struct Shell {
    pending: Option<Pending>,
    answer: Option<String>,
}

impl Shell {
    /// Whether a command waits for the store, or its answer for whoever takes it.
    pub(crate) fn is_busy(&self) -> bool {
        self.pending.is_some() || self.answer.is_some()
    }

    /// The answer to a command, once there is one.
    pub(crate) fn take_answer(&mut self) -> Option<String> {
        self.answer.take()
    }

    /// Begins a command. An empty line is none. `vifs` gives the table of vifs, if it is asked for.
    pub(crate) fn execute(
        &mut self,
        line: &str,
        client: &mut Client,
        vifs: impl FnOnce() -> String,
    ) {
        let (command, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let (path, value) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
        self.pending = match command {
            "" => return,
            "help" => return self.say(HELP),
            "vifs" => return self.say(&vifs()),
            "ls" => {
                let path = match path.trim_end_matches('/') {
                    "" if path.is_empty() => HOME,
                    "" => "/",
                    path => path,
                };
                Some(Pending::Children { job: client.list(path), path: path.into() })
            }
            "read" => Some(Pending::Value(client.read_many([path]))),
            "write" => {
                let (path, value) = (path.into(), value.as_bytes().to_vec());
                Some(Pending::Change(client.commit([Change::Write { path, value }])))
            }
            "rm" => Some(Pending::Change(client.commit([Change::Rm { path: path.into() }]))),
            _ => return self.fail("no such command: help shows them"),
        };
    }

    /// Takes a store event, if it is the end of what a command waits for.
    pub(crate) fn on_store(&mut self, client: &mut Client, event: &Event) -> bool {
        let Event::Done { job, result } = event else { return false };
        match self.pending.take_if(|pending| pending.job() == *job) {
            Some(pending) => {
                self.done(client, pending, result);
                true
            }
            None => false,
        }
    }

    fn done(&mut self, client: &mut Client, pending: Pending, result: &Result<Outcome, Error>) {
        match (pending, result) {
            (_, Err(error)) => self.fail(&format!("{error}")),
            (Pending::Value(_), Ok(Outcome::Values(values))) => {
                match values.first().and_then(Option::as_deref) {
                    Some(value) => self.say(&format!("\"{}\"\n", value.escape_ascii())),
                    None => self.fail("no such node"),
                }
            }
            (Pending::Children { path, .. }, Ok(Outcome::Names(Some(names)))) => {
                let left = names.len().saturating_sub(CHILDREN);
                let names: Vec<_> = names.iter().take(CHILDREN).cloned().collect();
                let root = if path == "/" { "" } else { &*path };
                let job = client.read_many(names.iter().map(|name| format!("{root}/{name}")));
                self.pending = Some(Pending::Values { job, names, left });
            }
            (Pending::Values { names, left, .. }, Ok(Outcome::Values(values))) => {
                let mut text = String::new();
                for (name, value) in names.iter().zip(values) {
                    let value = value.as_deref().unwrap_or_default();
                    // Writing to a string cannot fail.
                    let _ = writeln!(text, "{name} = \"{}\"", value.escape_ascii());
                }
                if left > 0 {
                    let _ = writeln!(text, "and {left} more");
                }
                self.say(&text);
            }
            (Pending::Change(_), Ok(_)) => self.say(""),
            (_, Ok(_)) => self.fail("no such node"),
        }
    }

    /// Answers a command that went well.
    fn say(&mut self, text: &str) {
        self.answer = Some(format!("{text}ok\n"));
    }

    fn fail(&mut self, why: &str) {
        self.answer = Some(format!("error: {why}\n"));
    }
}

#[cfg(test)]
mod tests {
    use hypercall::DomId;
    use xenbus::server::{ConnId, Quotas, Server};

    use super::*;

    struct Operator {
        server: Server,
        own: ConnId,
        client: Client,
        shell: Shell,
    }

    impl Operator {
        fn new() -> Self {
            let mut server = Server::new(Quotas::default());
            let own = server.connect(DomId(0), true);
            Self { server, own, client: Client::new(), shell: Shell::default() }
        }

        fn settle(&mut self) {
            loop {
                let sent = self.server.receive(self.own, self.client.pending_output()).unwrap();
                self.client.consume_output(sent);
                let answer = self.server.pending_output(self.own).to_vec();
                self.client.receive(&answer).unwrap();
                self.server.consume_output(self.own, answer.len());
                while let Some(event) = self.client.poll_event() {
                    self.shell.on_store(&mut self.client, &event);
                }
                if sent == 0 && answer.is_empty() {
                    break;
                }
            }
        }

        fn says(&mut self, line: &str) -> Option<String> {
            self.shell.execute(line, &mut self.client, || "1.0 Connected\n".into());
            self.settle();
            let answer = self.shell.take_answer();
            assert!(!self.shell.is_busy());
            answer
        }
    }

    #[test]
    fn nodes_are_written_read_listed_and_removed() {
        let mut operator = Operator::new();
        let mut says = |line| operator.says(line).unwrap();
        assert_eq!(says("write /a/b two words"), "ok\n");
        assert_eq!(says("write /a/c"), "ok\n");
        assert_eq!(says("  read   /a/b "), "\"two words\"\nok\n");
        assert_eq!(says("ls /a"), "b = \"two words\"\nc = \"\"\nok\n");
        assert_eq!(says("write netback/withdrawn map"), "ok\n");
        assert_eq!(says("read /local/domain/0/netback/withdrawn"), "\"map\"\nok\n");
        assert_eq!(says("ls"), "netback = \"\"\nok\n");
        assert_eq!(says("ls netback/"), "withdrawn = \"map\"\nok\n");
        assert!(says("ls /").contains("\na = \"\"\n") || says("ls /").starts_with("a = \"\"\n"));
        assert_eq!(says("rm /a"), "ok\n");
        assert_eq!(says("ls /a"), "error: no such node\n");
        assert_eq!(says("read /a/b"), "error: no such node\n");
    }

    #[test]
    fn what_is_no_command_is_answered_too() {
        let mut operator = Operator::new();
        assert_eq!(operator.says(""), None);
        assert_eq!(operator.says("   "), None);
        for line in ["nonsense", "read", "write", "write //x y", "rm", "rm /", "read a\\b"] {
            let answer = operator.says(line).unwrap();
            assert!(answer.starts_with("error: ") && answer.ends_with('\n'), "{line}: {answer}");
        }
        assert_eq!(operator.says("vifs").unwrap(), "1.0 Connected\nok\n");
        assert!(operator.says("help").unwrap().ends_with(".\nok\n"));
    }

    #[test]
    fn answers_are_bounded_and_plain() {
        let mut operator = Operator::new();
        for number in 0..CHILDREN + 3 {
            operator.says(&format!("write /many/{number:03} x"));
        }
        let text = operator.says("ls /many").unwrap();
        assert_eq!(text.lines().count(), CHILDREN + 2);
        assert!(text.ends_with("and 3 more\nok\n"));
        let value = b"\x1b[2J\n\xff".to_vec();
        operator.client.commit([Change::Write { path: "/x".into(), value }]);
        operator.settle();
        assert_eq!(operator.says("read /x").unwrap(), "\"\\x1b[2J\\n\\xff\"\nok\n");
    }
}
