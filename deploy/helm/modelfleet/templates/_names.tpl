{{/* Names, labels, addresses. */}}

{{- define "modelfleet.fullname" -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}{{ .Values.fullnameOverride }}
{{- else if contains $chart .Release.Name -}}{{ .Release.Name }}
{{- else -}}{{ .Release.Name }}-{{ $chart }}
{{- end -}}
{{- end -}}

{{/* Labels that selectors use; they never change, since a Deployment's selector cannot. Takes root, component, pool. */}}
{{- define "modelfleet.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
modelfleet.dev/pool: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The same in one line, as clients of the Kubernetes API take it. */}}
{{- define "modelfleet.selector" -}}
{{- $parts := list -}}
{{- range $label, $value := include "modelfleet.selectorLabels" . | fromYaml -}}
{{- $parts = append $parts (printf "%s=%s" $label $value) -}}
{{- end -}}
{{ join "," $parts }}
{{- end -}}

{{/*
Labels of an object: the chart's, those of the user, and those of selectors, each over the ones before. Takes root,
component, pool, own (further labels).
*/}}
{{- define "modelfleet.labels" -}}
{{- $chart := dict "app.kubernetes.io/version" .root.Chart.AppVersion "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $chart "app.kubernetes.io/part-of" "modelfleet" -}}
{{- $_ := set $chart "helm.sh/chart" (printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_")) -}}
{{- merge (include "modelfleet.podLabels" . | fromYaml) $chart | toYaml -}}
{{- end -}}

{{/* Labels of pods: without the chart's version, so that an upgrade restarts only pods that change. */}}
{{- define "modelfleet.podLabels" -}}
{{- $selector := include "modelfleet.selectorLabels" . | fromYaml -}}
{{- merge $selector (default dict .own) .root.Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Takes root, component. */}}
{{- define "modelfleet.serviceAccountName" -}}
{{- $account := (index .root.Values .component).serviceAccount -}}
{{- $made := printf "%s-%s" (include "modelfleet.fullname" .root) .component -}}
{{- ternary (default $made $account.name) (default "default" $account.name) $account.create -}}
{{- end -}}

{{/* A target that balances over all ready pods of one pool. Takes root, pool. */}}
{{- define "modelfleet.poolTarget" -}}
dns:///{{ include "modelfleet.fullname" .root }}-pool-{{ .pool }}.{{ .root.Release.Namespace }}.svc:8001
{{- end -}}

{{/* A target that balances over all ready pods of a service. Takes root, component, port. */}}
{{- define "modelfleet.target" -}}
dns:///{{ include "modelfleet.fullname" .root }}-{{ .component }}-headless.{{ .root.Release.Namespace }}.svc:{{ .port }}
{{- end -}}

{{/* Takes root, service (the image's name), image (the component's overrides), gpu. */}}
{{- define "modelfleet.image" -}}
{{- $common := .root.Values.image -}}
{{- $registry := ternary (printf "%s/" (trimSuffix "/" $common.registry)) "" (not (empty $common.registry)) -}}
{{- $repository := default (printf "%s%s/%s" $registry $common.repository .service) .image.repository -}}
{{- if .image.digest -}}{{ $repository }}@{{ .image.digest }}
{{- else -}}
{{- $tag := printf "%s%s" (default .root.Chart.AppVersion $common.tag) (ternary "-gpu" "" (default false .gpu)) -}}
{{ $repository }}:{{ default $tag .image.tag }}
{{- end -}}
{{- end -}}

{{/* Of all releases in the cluster, since the object is of no namespace. */}}
{{- define "modelfleet.priorityClassName" -}}
{{- if .Values.priorityClass.create }}{{ printf "%s-%s" .Release.Namespace (include "modelfleet.fullname" .) }}{{ end -}}
{{- end -}}
