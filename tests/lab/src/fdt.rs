//! Adds what Xen wants under `/chosen` to the flattened device tree that QEMU writes.

use anyhow::{Context as _, Result, ensure};

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;

/// A node to be added: properties first, then children.
pub struct Node {
    name: String,
    props: Vec<(String, Vec<u8>)>,
    children: Vec<Self>,
}

impl Node {
    /// A node without properties.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), props: Vec::new(), children: Vec::new() }
    }

    /// Adds a property without a value.
    pub fn flag(mut self, name: &str) -> Self {
        self.props.push((name.to_owned(), Vec::new()));
        self
    }

    /// Adds a property of strings.
    pub fn strings(mut self, name: &str, values: &[&str]) -> Self {
        let bytes = values.iter().flat_map(|v| v.bytes().chain([0])).collect();
        self.props.push((name.to_owned(), bytes));
        self
    }

    /// Adds a property of 32-bit cells.
    pub fn cells(mut self, name: &str, values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_be_bytes()).collect();
        self.props.push((name.to_owned(), bytes));
        self
    }

    /// Adds a child.
    pub fn child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    fn contents(&self, out: &mut Vec<u8>, names: &mut Vec<u8>) -> Result<()> {
        for (name, value) in &self.props {
            let offset = u32::try_from(names.len())?;
            names.extend(name.bytes().chain([0]));
            for word in [PROP, u32::try_from(value.len())?, offset] {
                out.extend(word.to_be_bytes());
            }
            out.extend(value);
            pad(out);
        }
        for child in &self.children {
            out.extend(BEGIN_NODE.to_be_bytes());
            out.extend(child.name.bytes().chain([0]));
            pad(out);
            child.contents(out, names)?;
            out.extend(END_NODE.to_be_bytes());
        }
        Ok(())
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let part = bytes.get(at..at + 4).context("truncated device tree")?;
    Ok(u32::from_be_bytes(part.try_into()?))
}

fn part(bytes: &[u8], from: u32, size: u32) -> Result<&[u8]> {
    let from = usize::try_from(from)?;
    bytes.get(from..from + usize::try_from(size)?).context("truncated device tree")
}

/// Where new properties of `/chosen` belong: after its own, before its children.
fn chosen(tree: &[u8]) -> Result<usize> {
    let (mut at, mut depth, mut inside) = (0, 0, false);
    loop {
        let here = at;
        let token = word(tree, at)?;
        at += 4;
        if inside && token != PROP && token != NOP {
            return Ok(here);
        }
        match token {
            BEGIN_NODE => {
                let rest = tree.get(at..).unwrap_or_default();
                let length = rest.iter().position(|b| *b == 0).context("unterminated node name")?;
                depth += 1;
                inside = depth == 2 && rest.get(..length) == Some(b"chosen");
                at = (at + length + 1).next_multiple_of(4);
            }
            END_NODE => depth -= 1,
            PROP => at = (at + 8 + usize::try_from(word(tree, at)?)?).next_multiple_of(4),
            NOP => {}
            _ => anyhow::bail!("QEMU's device tree has no /chosen node"),
        }
    }
}

/// The device tree with the properties and children of `more` added to `/chosen`.
pub fn add_to_chosen(dtb: &[u8], more: &Node) -> Result<Vec<u8>> {
    ensure!(word(dtb, 0)? == MAGIC, "not a device tree");
    let tree = part(dtb, word(dtb, 8)?, word(dtb, 36)?)?;
    let mut names = part(dtb, word(dtb, 12)?, word(dtb, 32)?)?.to_vec();
    let reserved_at = word(dtb, 16)?;
    let reserved_end = [word(dtb, 8)?, word(dtb, 12)?, word(dtb, 4)?]
        .into_iter()
        .filter(|end| *end > reserved_at)
        .min()
        .context("odd device tree")?;
    let reserved = part(dtb, reserved_at, reserved_end - reserved_at)?;

    let (before, after) = tree.split_at(chosen(tree)?);
    let mut tree = before.to_vec();
    more.contents(&mut tree, &mut names)?;
    tree.extend(after);

    let header = 40;
    let tree_at = (header + reserved.len()).next_multiple_of(8);
    let names_at = tree_at + tree.len();
    let total = names_at + names.len();
    let mut out = Vec::with_capacity(total);
    for value in [
        MAGIC,
        u32::try_from(total)?,
        u32::try_from(tree_at)?,
        u32::try_from(names_at)?,
        u32::try_from(header)?,
        word(dtb, 20)?,
        word(dtb, 24)?,
        word(dtb, 28)?,
        u32::try_from(names.len())?,
        u32::try_from(tree.len())?,
    ] {
        out.extend(value.to_be_bytes());
    }
    out.extend(reserved);
    out.resize(tree_at, 0);
    out.extend(tree);
    out.extend(names);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Vec<u8> {
        let mut tree = Vec::new();
        let mut names = Vec::new();
        let root = Node::new("").child(Node::new("").child(Node::new("memory").flag("a")).child(
            Node::new("chosen").strings("stdout-path", &["/pl011"]).child(Node::new("inner")),
        ));
        root.contents(&mut tree, &mut names).unwrap();
        tree.extend(9u32.to_be_bytes());
        let mut out = Vec::new();
        let (tree_at, names_at) = (56, 56 + tree.len());
        let total = names_at + names.len();
        for v in [MAGIC as usize, total, tree_at, names_at, 40, 17, 16, 0, names.len(), tree.len()]
        {
            out.extend((v as u32).to_be_bytes());
        }
        out.extend([0; 16]);
        out.extend(tree);
        out.extend(names);
        out
    }

    #[test]
    fn properties_go_before_children() {
        let more = Node::new("").cells("#address-cells", &[2]).child(Node::new("domU1"));
        let out = add_to_chosen(&small(), &more).unwrap();
        let find = |text: &[u8]| out.windows(text.len()).position(|w| w == text).unwrap();
        assert!(find(b"chosen\0") < find(b"/pl011\0"));
        assert!(find(b"/pl011\0") < find(&[0, 0, 0, 4]));
        assert!(find(b"domU1\0") < find(b"inner\0"));
        assert_eq!(word(&out, 4).unwrap() as usize, out.len());
        assert_eq!(part(&out, word(&out, 16).unwrap(), 16).unwrap(), [0; 16]);
    }

    #[test]
    fn a_tree_without_chosen_is_an_error() {
        let mut dtb = small();
        let at = dtb.windows(6).position(|w| w == b"chosen").unwrap();
        dtb[at] = b'x';
        assert!(add_to_chosen(&dtb, &Node::new("")).is_err());
    }
}
