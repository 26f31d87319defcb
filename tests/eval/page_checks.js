// Helpers of the browser tests. Every function returns a list of problems, or a value of the page.

const seen = selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility());
const excerpt = element => element.outerHTML.slice(0, 160);

// Shapes outside their chart, and charts outside their card or too small to see.
function outsideTheirBoxes() {
  const leaves = (a, b) => a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  return seen('svg').flatMap(svg => {
    const box = svg.getBoundingClientRect();
    const card = (svg.closest('.card, .verdict') || document.body).getBoundingClientRect();
    const shapes = [...svg.querySelectorAll('rect, circle, line, polyline')];
    const wrong = shapes.filter(shape => leaves(shape.getBoundingClientRect(), box));
    if (leaves(box, card) || box.width < 4 || box.height < 4) wrong.push(svg);
    return wrong.map(excerpt);
  });
}

// Texts with a contrast below 4.5 to their background (relative luminance as in WCAG 2.2).
function tooPale() {
  const channels = colour => colour.match(/[\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = channels(colour).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return seen('body *').filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
    const [high, low] = [getComputedStyle(e).color, background(e)].map(luminance).sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(excerpt);
}

// Axis labels that overlap.
function labelsOverOneAnother() {
  return seen('.ticks').flatMap(row => {
    const boxes = [...row.children].map(e => e.getBoundingClientRect());
    return boxes.some((box, i) => i && box.left < boxes[i - 1].right) ? [excerpt(row)] : [];
  });
}

const openAll = () => document.querySelectorAll('details').forEach(details => { details.open = true; });
// A phone zooms out of a page that is too wide, and innerWidth grows with it: clientWidth does not.
const widerThanTheScreen = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
const count = selector => document.querySelectorAll(selector).length;
const text = selector => document.querySelector(selector).innerText;
const boxes = selector => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect()).map(
  box => ({left: box.left, right: box.right, top: box.top, bottom: box.bottom, width: box.width}));
const foldedAway = () => [...document.querySelectorAll('details:not([open]) pre')].filter(
  e => !e.checkVisibility()).length;
