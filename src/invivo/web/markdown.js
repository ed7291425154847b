// The little Markdown that models write, as DOM nodes: nothing is ever parsed as HTML.

const INLINE = /(`[^`\n]+`)|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\n]+)\*(?![\w*])/g;

function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(from, match.index));
    if (match[1]) nodes.push(element("code", match[1].slice(1, -1)));
    else if (match[2]) nodes.push(element("strong", match[2]));
    else nodes.push(element("em", match[3]));
    from = match.index + match[0].length;
  }
  nodes.push(text.slice(from));
  return nodes;
}

function kindOf(line) {
  if (/^\s*```/.test(line)) return "fence";
  if (/^#{1,6}\s/.test(line)) return "heading";
  if (/^\s*[-*+]\s+/.test(line)) return "ul";
  if (/^\s*\d+[.)]\s+/.test(line)) return "ol";
  return line.trim() ? "text" : "blank";
}

export function render(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let i = 0;
  while (i < lines.length) {
    const kind = kindOf(lines[i]);
    if (kind === "blank") {
      i++;
    } else if (kind === "fence") {
      const code = [];
      for (i++; i < lines.length && kindOf(lines[i]) !== "fence"; i++) code.push(lines[i]);
      i++;
      out.append(element("pre", element("code", code.join("\n"))));
    } else if (kind === "heading") {
      out.append(element("h3", ...inline(lines[i++].replace(/^#+\s*/, ""))));
    } else if (kind === "ul" || kind === "ol") {
      const list = element(kind);
      if (kind === "ol") list.start = parseInt(lines[i], 10);
      for (; i < lines.length; i++) {
        // one empty line between two items keeps them in one list
        if (kindOf(lines[i]) === "blank" && kindOf(lines[i + 1] ?? "") === kind) continue;
        if (kindOf(lines[i]) !== kind) break;
        list.append(element("li", ...inline(lines[i].replace(/^\s*(?:[-*+]|\d+[.)])\s+/, ""))));
      }
      out.append(list);
    } else {
      const paragraph = [];
      for (; i < lines.length && kindOf(lines[i]) === "text"; i++) {
        if (paragraph.length) paragraph.push(document.createElement("br"));
        paragraph.push(...inline(lines[i]));
      }
      out.append(element("p", ...paragraph));
    }
  }
  return out;
}
