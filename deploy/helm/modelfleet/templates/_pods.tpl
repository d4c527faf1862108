{{/* What pods share, whether of a service or of a Job. */}}

{{/* Where a pod may run: the one block that every pod and Job uses. Takes root, own (a component, pool or Job),
labels, and priorityClassName where the user's values name none. */}}
{{- define "modelfleet.scheduling" -}}
{{- $common := .root.Values.scheduling -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default $common.runtimeClassName .own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with coalesce .own.priorityClassName $common.priorityClassName .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with default $common.schedulerName .own.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with default $common.nodeSelector .own.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default $common.tolerations .own.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default $common.affinity .own.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $labels := .labels }}
{{- with default $common.topologySpreadConstraints .own.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range . }}
  - {{ mergeOverwrite (dict "labelSelector" (dict "matchLabels" (fromYaml $labels))) . | toYaml | nindent 4 | trim }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
Environment of a container: what the user sets, in place of what the chart would. A name may not stand twice: server-side
apply refuses that. Takes env (a YAML list), own, secret.
*/}}
{{- define "modelfleet.environment" -}}
{{- $own := default list .own.extraEnv -}}
{{- $names := list -}}
{{- range $own }}{{ $names = append $names .name }}{{ end -}}
env:
{{- range .env | fromYamlArray }}
{{- if not (has .name $names) }}
  - {{ toYaml . | nindent 4 | trim }}
{{- end }}
{{- end }}
{{- with $own }}{{ toYaml . | nindent 2 }}{{ end }}
{{- $sources := default list .own.extraEnvFrom }}
{{- with .secret }}{{ $sources = append $sources (dict "secretRef" (dict "name" .)) }}{{ end }}
{{- with $sources }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What all servers are told. Takes root, delaySeconds where a drain's is another. */}}
{{- define "modelfleet.serverEnv" -}}
{{- with .root.Values.drain -}}
- {name: MODELFLEET_DRAIN_DELAY_S, value: {{ get $ "delaySeconds" | default .delaySeconds | quote }}}
- {name: MODELFLEET_DRAIN_TIMEOUT_S, value: {{ .timeoutSeconds | quote }}}
{{- end }}
{{- with .root.Values.connections }}
- {name: MODELFLEET_MAX_CONNECTION_AGE_S, value: {{ .maxAgeSeconds | quote }}}
- {name: MODELFLEET_MAX_MESSAGE_BYTES, value: {{ int64 .maxMessageBytes | quote }}}
- {name: MODELFLEET_MAX_METADATA_BYTES, value: {{ int64 .maxMetadataBytes | quote }}}
{{- end }}
{{- end -}}

{{- define "modelfleet.terminationGracePeriodSeconds" -}}
{{ add (ceil .preStopSeconds) (ceil .delaySeconds) (ceil .timeoutSeconds) 10 }}
{{- end -}}

{{/* Ports, probes and stop of a server. Takes root, port, metricsPort, startupSeconds. */}}
{{- define "modelfleet.server" -}}
ports:
  - {name: grpc, containerPort: {{ .port }}}
  - {name: metrics, containerPort: {{ .metricsPort }}}
startupProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .startupSeconds 4) 5 }}
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- with int .root.Values.drain.preStopSeconds }}
lifecycle:
  preStop: {sleep: {seconds: {{ . }}}}
{{- end }}
# Why a container ended is then said by `kubectl describe pod` and `modelfleet pools show`.
terminationMessagePolicy: FallbackToLogsOnError
securityContext: {{- toYaml .root.Values.security.container | nindent 2 }}
{{- end -}}
