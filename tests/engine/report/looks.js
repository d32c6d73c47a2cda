// What is wrong with the page as it is laid out now: a list of lines, empty where nothing is.
// WCAG is the Web Content Accessibility Guidelines 2.2.
const SMALLEST_TEXT = 12, TAP_TARGET = 44, LONGEST_WORD = 24;
const found = new Set();
const place = (node) => {
  const element = node.nodeType === Node.TEXT_NODE ? node.parentElement : node;
  return `<${element.tagName.toLowerCase()}> "${(element.textContent || element.alt || "").trim().slice(0, 40)}"`;
};
const shown = (element) => element.getClientRects().length > 0 && getComputedStyle(element).visibility === "visible";
const ancestors = function* (element) { for (; element; element = element.parentElement) yield element; };

const parse = (colour) => {
  const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
  return { rgb: [r, g, b], a };
};
const over = (top, under) => top.rgb.map((c, i) => top.a * c + (1 - top.a) * under[i]);
const background = (element) => {
  let colour = document.documentElement.matches(":root") && matchMedia("(prefers-color-scheme: dark)").matches
    ? [18, 18, 18] : [255, 255, 255];
  for (const each of [...ancestors(element)].reverse()) colour = over(parse(getComputedStyle(each).backgroundColor), colour);
  return colour;
};
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

const width = Math.min(screen.width, document.documentElement.clientWidth);
if (document.documentElement.scrollWidth > width)
  found.add(`the page is ${document.documentElement.scrollWidth} pixels wide on a screen of ${width}`);
if (!document.documentElement.lang) found.add("the page has no language");
if (!document.title) found.add("the page has no title");

for (const picture of document.querySelectorAll("img, svg, canvas")) {
  const text = picture.getAttribute("alt") || picture.getAttribute("aria-label") || picture.querySelector("title")?.textContent;
  if (!text || text.trim().length < 10) found.add(`${place(picture)}: a picture without an alternative text`);
  if (picture.tagName === "IMG" && shown(picture) && !(picture.complete && picture.naturalWidth))
    found.add(`${place(picture)}: a picture that is not drawn`);
}

let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  const own = Number(heading.tagName[1]);
  if (own > level + 1) found.add(`${place(heading)}: a heading of level ${own} below one of level ${level}`);
  if (!heading.textContent.trim()) found.add(`${place(heading)}: an empty heading`);
  level = own;
}
if (document.querySelectorAll("h1").length !== 1) found.add("the page has not one heading of level 1");

for (const table of document.querySelectorAll("table")) {
  const box = [...ancestors(table)].find((e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX));
  if (!box) found.add(`${place(table)}: a table outside a box of its own to scroll in`);
  if (!table.tHead) found.add(`${place(table)}: a table without a head`);
}

for (const target of document.querySelectorAll("a, button, summary, input, select")) {
  const box = target.getBoundingClientRect();
  if (shown(target) && (box.height < TAP_TARGET || box.width < TAP_TARGET))
    found.add(`${place(target)}: ${Math.round(box.width)} x ${Math.round(box.height)} pixels are too few for a finger`);
}

const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const node = texts.currentNode, element = node.parentElement, style = getComputedStyle(element);
  if (!node.textContent.trim() || !shown(element)) continue;
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const behind = background(element), own = over(parse(style.color), behind), ratio = contrast(own, behind);
  if (ratio < (large ? 3 : 4.5)) found.add(`${place(node)}: contrast ${ratio.toFixed(2)} of ${style.color}`);
  if (size < SMALLEST_TEXT) found.add(`${place(node)}: text of ${size} pixels`);
  const range = document.createRange();
  for (const word of node.textContent.matchAll(/[\p{L}\p{N}.]+/gu)) {
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
    if (word[0].length <= LONGEST_WORD && lines.size > 1)
      found.add(`${place(node)}: "${word[0]}" is broken over ${lines.size} lines`);
  }
}
return [...found];
