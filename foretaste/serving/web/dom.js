// Makes elements. Text is only ever text: nothing here parses HTML.

export const byId = (id) => document.getElementById(id);

export function make(name, { text, cls, on, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  for (const [event, act] of Object.entries(on ?? {})) element.addEventListener(event, act);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(attribute, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}

export const fill = (element, ...children) => element.replaceChildren(...children.filter(Boolean));

// Arrow keys walk from a search field through the buttons of its list and back.
export function walkable(field, list) {
  const step = (event) => {
    const stops = [field, ...list.querySelectorAll("button")];
    const here = stops.indexOf(document.activeElement);
    if (event.key === "Escape" && here > 0) field.focus();
    else if (event.key === "ArrowDown" && here < stops.length - 1) stops[here + 1].focus();
    else if (event.key === "ArrowUp" && here > 0) stops[here - 1].focus();
    else return;
    event.preventDefault();
  };
  field.addEventListener("keydown", step);
  list.addEventListener("keydown", step);
}

// Runs `act` when typing pauses, and drops answers that a later question has overtaken.
export function whileTyping(field, ask, show) {
  let timer = 0, newest = 0;
  const run = async () => {
    const mine = ++newest;
    const answer = await ask(field.value);
    if (mine === newest) show(answer);
  };
  field.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(run, 120); });
  return { now: run, stop: () => { clearTimeout(timer); newest += 1; } };
}
