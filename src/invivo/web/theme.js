// Light, dark, or what the system says; charts ask here for their colours.

const ORDER = ["auto", "light", "dark"];
const ICONS = { auto: "◐", light: "☀", dark: "☾" };
const LABELS = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };

export function setUpTheme(button, onChange) {
  let theme = localStorage.getItem("invivo-theme") || "auto";
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = ICONS[theme];
    button.setAttribute("aria-label", LABELS[theme]);
    button.title = LABELS[theme];
    onChange();
  };
  button.addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    localStorage.setItem("invivo-theme", theme);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}

// Canvas needs a resolved colour; a custom property may hold light-dark(...).
export function cssColour(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
